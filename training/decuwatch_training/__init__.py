"""Train, export, check and evaluate DECU ensembles (Berry, Brando, Meger, UAI 2024) for decuwatch.

An ensemble is one frozen class-conditional diffusion backbone and M small tables of class embeddings. Every verb of the
command line is one module with ``add_arguments(parser)`` and ``run(arguments)``; see ``cli.py``.
"""

__version__ = "0.1.0"
