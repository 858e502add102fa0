"""The command line: picks the verb's module, parses its arguments, turns errors into exit codes.

A verb is a module with a docstring, ``add_arguments(parser)`` and ``run(arguments)``; adding one is a line in VERBS.
"""

import argparse
import errno
import importlib
import os
import sys
from collections.abc import Sequence

from decuwatch_training.errors import TrainingError

VERBS = {
    "pretrain": "train an autoencoder and a class-conditional latent diffusion backbone",
    "convert": "convert a Lightning checkpoint to safetensors without running its code",
    "inspect": "say what the images of each class are worth, and which files to look at",
    "train": "train M class-embedding tables on a frozen backbone",
    "judge": "train and measure the classifier that tells whether an image is of the class asked for",
    "export": "write the ensemble directory that decuwatch reads",
    "check": "hold ONNX Runtime against PyTorch on an exported ensemble",
    "golden": "write the numbers that the Go sampler is held against",
    "evaluate": "measure how well the scores find gaps, and at what cost",
    "paper": "write a random-weight ensemble of the paper's size, to measure speed",
    "bench": "time the authors' way of computing the scores, in PyTorch",
    "sample": "draw a PNG grid of classes by components",
    "tiny": "write a random-weight ensemble for tests of readers of the format",
}

OF_THE_USER = {
    getattr(errno, name)
    for name in [
        "ENOSPC",
        "EDQUOT",
        "EACCES",
        "EPERM",
        "EROFS",
        "ENOENT",
        "ENOTDIR",
        "EISDIR",
        "EEXIST",
        "ENAMETOOLONG",
        "ELOOP",
    ]
}
"""What the operating system says of a path that the user gave; another error is a fault of the program."""


class _Formatter(argparse.ArgumentDefaultsHelpFormatter, argparse.RawDescriptionHelpFormatter):
    """Shows defaults, and the module's docstring as it stands."""


def main(argv: Sequence[str] | None = None) -> int:
    """Run one verb. Returns 0, 1 for an error the user can mend, 2 for wrong usage, 130 when interrupted."""
    parser = argparse.ArgumentParser(
        prog="decuwatch-train", description="Train the ensembles that decuwatch scores with."
    )
    subparsers = parser.add_subparsers(dest="verb", required=True, metavar="VERB")
    words = list(sys.argv[1:] if argv is None else argv)
    chosen = words[0] if words else ""
    for verb, summary in VERBS.items():
        subparser = subparsers.add_parser(verb, help=summary, formatter_class=argparse.ArgumentDefaultsHelpFormatter)
        if verb == chosen:  # torch takes seconds to import: only the chosen verb is loaded
            module = importlib.import_module(f"decuwatch_training.{verb}")
            subparser.description = module.__doc__
            subparser.formatter_class = _Formatter
            module.add_arguments(subparser)
            subparser.set_defaults(run=module.run)
    arguments = parser.parse_args(words)
    try:
        arguments.run(arguments)
    except TrainingError as err:
        print(f"decuwatch-train {arguments.verb}: {err}", file=sys.stderr)
        return 1
    except OSError as err:
        if err.errno not in OF_THE_USER:
            raise
        print(
            f"decuwatch-train {arguments.verb}: {os.strerror(err.errno or 0)}: {err.filename or err}", file=sys.stderr
        )
        return 1
    except KeyboardInterrupt:
        print(
            f"decuwatch-train {arguments.verb}: interrupted; the last checkpoint is kept, run the same command to go "
            "on",
            file=sys.stderr,
        )
        return 130
    return 0
