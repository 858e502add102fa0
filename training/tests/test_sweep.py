"""Mutate every field and tensor of every supported format: the same numbers as diffusers, or refused by file and field.

Every case is listed, then as many as DECUWATCH_SWEEP_CASES are drawn (0: all of them) with DECUWATCH_SWEEP_SEED. Both
are printed, so that a case that fails can be run again.
"""

import collections
import copy
import inspect
import json
import os
import random
import shutil
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest
import torch
import yaml
from diffusers import (
    AutoencoderKL,
    DDIMScheduler,
    DDPMScheduler,
    DiTTransformer2DModel,
    PNDMScheduler,
    UNet2DConditionModel,
    VQModel,
)
from safetensors.torch import load_file, save_file
from torch import Tensor

from decuwatch_training import compvis
from decuwatch_training.backbone import Backbone, load_backbone
from decuwatch_training.diffusion import NoiseSchedule, Sampler
from decuwatch_training.errors import TrainingError
from tests.test_formats import FIRST_STAGE, UNET, LatentDiffusionNames, compvis_configuration

CASES = int(os.environ.get("DECUWATCH_SWEEP_CASES", "150"))
SEED = int(os.environ.get("DECUWATCH_SWEEP_SEED", random.SystemRandom().randrange(2**32)))
STEPS = (1, 7, 20, 50)
STEM = "diffusion_pytorch_model.safetensors"


@dataclass(frozen=True)
class Case:
    """A change of a backbone's directory, made in place; ``names`` are what a refusal has to say one of."""

    label: str
    change: Callable[[Path], None]
    names: tuple[str, ...]


def diffusers_directory(root: Path, denoiser: str, autoencoder: str, scheduler: str) -> Path:
    """A small real backbone, saved by diffusers; DiTs as Transformer2DModel are relabelled."""
    torch.manual_seed(5)
    path = root / f"{denoiser}-{autoencoder}-{scheduler}"
    if denoiser == "unet":
        UNet2DConditionModel(**UNET).save_pretrained(path / "unet")
    else:
        dit = DiTTransformer2DModel(
            num_attention_heads=2,
            attention_head_dim=8,
            in_channels=2,
            out_channels=4,
            num_layers=1,
            norm_num_groups=4,
            sample_size=4,
            num_embeds_ada_norm=6,
        )
        with torch.no_grad():
            for parameter in dit.parameters():
                if not parameter.any():
                    parameter.normal_(std=0.1)
        dit.save_pretrained(path / "transformer")
        if denoiser == "transformer2d":
            edit(
                path / "transformer" / "config.json",
                lambda config: config.update(_class_name="Transformer2DModel", cross_attention_dim=None),
            )
    if autoencoder == "kl":
        AutoencoderKL(**FIRST_STAGE, scaling_factor=0.7, shift_factor=0.1).save_pretrained(path / "vae")
    else:
        spatial = {"norm_type": "spatial", "block_out_channels": (32, 32)} if autoencoder == "movq" else {}
        VQModel(**{**FIRST_STAGE, "scaling_factor": 0.7, "num_vq_embeddings": 16, **spatial}).save_pretrained(
            path / "vqvae"
        )
    kinds: dict[str, Any] = {"ddim": DDIMScheduler, "ddpm": DDPMScheduler, "pndm": PNDMScheduler}
    clip = {} if scheduler == "pndm" else {"clip_sample": False}
    kinds[scheduler](beta_schedule="scaled_linear", steps_offset=1, **clip).save_pretrained(path / "scheduler")
    edit(path / "scheduler" / "scheduler_config.json", lambda config: config.update(clip_sample=False))
    return path


def edit(file: Path, change: Callable[[dict[str, Any]], Any]) -> None:
    config = json.loads(file.read_text())
    change(config)
    file.write_text(json.dumps(config))


def replacements(value: Any) -> Iterator[Any]:
    """Other values for a field: no value, other types, neighbours, names that a reader might take for the same."""
    yield from (None, True, False, 0, 1, -1, 3, 1.5, float("nan"), "", "x", [], {}, [None], 10**9)
    if isinstance(value, bool):
        yield str(value)
    elif isinstance(value, int):
        yield from (
            value + 1,
            value - 1,
            2 * value,
            float(value),
            str(value),
            [value],
            [value, value],
            [value, value + 1],
        )
    elif isinstance(value, float):
        yield from (value * 1.5, -value, value + 1, str(value))
    elif isinstance(value, str):
        yield from (value.upper(), f"{value} ", [value], f"{value[:1]}{value[2:]}")
    elif isinstance(value, list) and value:
        yield from (value[1:], [*value, value[-1]], value[::-1], [str(entry) for entry in value], value[0])
        if isinstance(value[0], int):
            yield from (
                [entry + 1 for entry in value],
                [2 * entry for entry in value],
                [float(entry) for entry in value],
            )
    yield from OTHER_NAMES


OTHER_NAMES = (
    "linear", "squaredcos_cap_v2", "sigmoid", "traling", "trailing", "linspace", "v_prediction", "sample",
    "flow_prediction", "text_time", "timestep", "fourier", "scale_shift", "spatial", "gelu", "geglu", "layer_norm",
    "gated", "UNetMidBlock2D", "UNetMidBlock2DSimpleCrossAttn", "text_proj", "learned_range",
)  # fmt: skip


def field_cases(file: str, kind: Any, config: dict[str, Any]) -> Iterator[Case]:
    """Each field of the class or the file, dropped and replaced; fields that do not exist; duplicate keys."""
    fields = [name for name in inspect.signature(kind.__init__).parameters if name != "self"]
    known = dict.fromkeys([*config, *fields])

    def setter(name: str, value: Any) -> Callable[[Path], None]:
        return lambda path: edit(path / file, lambda found: found.update({name: value}))

    for name in known:
        if name == "_diffusers_version":
            continue
        if name in config:
            yield Case(
                f"{file}: drop {name}",
                lambda path, name=name: edit(path / file, lambda found: found.pop(name)),
                (name,),
            )
            yield Case(f"{file}: twice {name}", lambda path, name=name: twice(path / file, name), (name,))
        default = inspect.signature(kind.__init__).parameters[name].default if name in fields else None
        for value in replacements(config.get(name, default)):
            yield Case(f"{file}: {name} = {value!r}", setter(name, value), (name,))
    for name in ("unknown", "_use_default_values", "quantization_config", "auto_map", "ch_mult", "z_channels"):
        yield Case(f"{file}: unknown {name}", setter(name, ["scaling_factor", "beta_schedule"]), (name,))


def twice(file: Path, name: str) -> None:
    """The key again at the end, with another value, as an editor's slip leaves it."""
    text = file.read_text().rstrip().removesuffix("}")
    file.write_text(f"{text}, {json.dumps(name)}: 7}}")


def tensor_cases(folder: str, weights: dict[str, Tensor]) -> Iterator[Case]:
    """Each tensor dropped, renamed, reshaped, doubled, retyped, made NaN; and the files themselves."""
    file = f"{folder}/{STEM}"

    def case(what: str, name: str, change: Callable[[dict[str, Tensor]], Any]) -> Case:
        def apply(path: Path) -> None:
            found = load_file(path / file)
            change(found)
            save_file(found, path / file)

        return Case(f"{file}: {what} {name}", apply, (name, "tensors"))

    for name in weights:
        yield case("drop", name, lambda found, name=name: found.pop(name))
        yield case("rename", name, lambda found, name=name: found.update({f"{name}_": found.pop(name)}))
        yield case("double", name, lambda found, name=name: found.update({f"model.{name}": found[name].clone()}))
        yield case("reshape", name, lambda found, name=name: found.update({name: found[name][None].contiguous()}))
        yield case("cut", name, lambda found, name=name: found.update({name: found[name][:-1].contiguous()}))
        for value in (float("nan"), float("inf")):
            yield case(
                f"{value} in", name, lambda found, name=name, value=value: found[name].view(-1)[-1:].fill_(value)
            )
        for kind in (torch.float16, torch.bfloat16, torch.float64, torch.int64, torch.bool):
            yield case(f"{kind}", name, lambda found, name=name, kind=kind: found.update({name: found[name].to(kind)}))
        if any(part in name for part in ("to_q", "to_k", "to_v", "to_out.0")):
            older = (
                name.replace("to_q", "query")
                .replace("to_k", "key")
                .replace("to_v", "value")
                .replace("to_out.0", "proj_attn")
            )
            yield case(
                "older name of", name, lambda found, name=name, older=older: found.update({older: found.pop(name)})
            )
            yield case(
                "both names of", name, lambda found, name=name, older=older: found.update({older: found[name] + 1})
            )
    yield Case(f"{file}: empty", lambda path: (path / file).write_bytes(b""), (STEM,))
    yield Case(f"{file}: cut short", lambda path: (path / file).write_bytes((path / file).read_bytes()[:-5]), (STEM,))
    yield Case(f"{file}: no file", lambda path: (path / file).unlink(), (STEM,))
    yield Case(f"{file}: no tensors", lambda path: save_file({}, path / file), ("tensors",))
    yield from file_cases(folder)


def file_cases(folder: str) -> Iterator[Case]:
    """Other files for the same weights: variants, shards, ``.bin``."""
    stem = STEM.removesuffix(".safetensors")

    def rename(*names: str) -> Callable[[Path], None]:
        def apply(path: Path) -> None:
            source = path / folder / STEM
            for name in names:
                if name != STEM:
                    shutil.copy(source, source.with_name(name))
            if STEM not in names:
                source.unlink()

        return apply

    def halves(path: Path) -> None:
        """As diffusers shards a checkpoint."""
        weights = load_file(path / folder / STEM)
        names = sorted(weights)
        parts = {f"{stem}-00001-of-00002.safetensors": names[::2], f"{stem}-00002-of-00002.safetensors": names[1::2]}
        for file, kept in parts.items():
            save_file({name: weights[name] for name in kept}, path / folder / file)
        (path / folder / STEM).unlink()
        places = {name: file for file, kept in parts.items() for name in kept}
        (path / folder / f"{STEM}.index.json").write_text(
            json.dumps({"metadata": {"total_size": 1}, "weight_map": places})
        )

    def beside(path: Path) -> None:
        whole = (path / folder / STEM).read_bytes()
        halves(path)
        (path / folder / STEM).write_bytes(whole)

    def sharded(change: Callable[[dict[str, str], Path], Any]) -> Callable[[Path], None]:
        def apply(path: Path) -> None:
            halves(path)
            edit(path / folder / f"{STEM}.index.json", lambda index: change(index["weight_map"], path / folder))

        return apply

    def binary(path: Path) -> None:
        torch.save(load_file(path / folder / STEM), path / folder / f"{stem}.bin")
        (path / folder / STEM).unlink()

    yield Case(f"{folder}: fp16 variant", rename(f"{stem}.fp16.safetensors"), (stem,))
    yield Case(f"{folder}: ema variant", rename(f"{stem}.ema.safetensors"), (f"{stem}.ema.safetensors",))
    yield Case(
        f"{folder}: two variants",
        rename(f"{stem}.fp16.safetensors", f"{stem}.non_ema.safetensors"),
        (f"{stem}.non_ema.safetensors",),
    )
    yield Case(f"{folder}: variant beside", rename(STEM, f"{stem}.fp16.safetensors"), (stem,))
    yield Case(f"{folder}: bin", binary, (stem,))
    yield Case(f"{folder}: shards", halves, (stem,))
    yield Case(
        f"{folder}: shards beside",
        lambda path: (
            copied := (path / folder / STEM).read_bytes(),
            halves(path),
            (path / folder / STEM).write_bytes(copied),
        ),
        (stem,),
    )
    yield Case(f"{folder}: tensor not in index", sharded(lambda places, _: places.popitem()), ("weight_map",))
    yield Case(
        f"{folder}: tensor not in shards",
        sharded(lambda places, _: places.update(more=next(iter(places.values())))),
        ("weight_map",),
    )
    yield Case(
        f"{folder}: shards swapped",
        sharded(lambda places, _: places.update({name: next(iter(places.values())) for name in places})),
        ("weight_map",),
    )
    yield Case(
        f"{folder}: shard elsewhere",
        sharded(lambda places, _: places.update({next(iter(places)): "../x.safetensors"})),
        ("weight_map",),
    )
    yield Case(
        f"{folder}: shard missing", sharded(lambda places, at: (at / next(iter(places.values()))).unlink()), (stem,)
    )


@torch.no_grad()
def compare_with_diffusers(backbone: Backbone, path: Path) -> None:
    """The same files through diffusers' readers: predictions, decoded and encoded images, alphas, timesteps, steps."""
    generator = torch.Generator().manual_seed(3)
    latent = torch.randn(2, *backbone.latent_shape, generator=generator)
    timestep = torch.tensor([0, backbone.schedule.train_timesteps - 1])
    options: dict[str, Any] = {"local_files_only": True, "low_cpu_mem_usage": False}

    def variant(folder: Path) -> dict[str, Any]:
        plain = any((folder / name).exists() for name in (STEM, f"{STEM}.index.json", "diffusion_pytorch_model.bin"))
        return options if plain else options | {"variant": "fp16"}

    if (path / "unet").exists():
        context = torch.randn(2, 3, backbone.context_dim, generator=generator)
        unet = UNet2DConditionModel.from_pretrained(path / "unet", **variant(path / "unet")).float().eval()
        wanted = unet(latent, timestep, encoder_hidden_states=context).sample
    else:
        assert backbone.reference is not None
        label = torch.tensor([0, len(backbone.reference) - 1])
        context = backbone.reference[label]
        dit: Any = (
            DiTTransformer2DModel.from_pretrained(path / "transformer", **variant(path / "transformer")).float().eval()
        )
        wanted = dit(latent, timestep=timestep, class_labels=label).sample[:, : latent.shape[1]]
    torch.testing.assert_close(backbone.denoiser(latent, timestep, context), wanted, rtol=1e-5, atol=1e-6)
    folder = next(path / name for name in ("vae", "vqvae") if (path / name).exists())
    kind: Any = VQModel if folder.name == "vqvae" else AutoencoderKL
    vae = kind.from_pretrained(folder, **variant(folder)).float().eval()
    shift = vae.config.get("shift_factor") or 0.0
    image = vae.decode(latent / vae.config.scaling_factor + shift).sample
    torch.testing.assert_close(backbone.decode(latent), image, rtol=1e-5, atol=1e-6)
    encoded = vae.encode(image)
    mean = encoded.latents if kind is VQModel else encoded.latent_dist.mode()
    torch.testing.assert_close(backbone.encode(image), (mean - shift) * vae.config.scaling_factor, rtol=1e-4, atol=1e-5)
    compare_schedule(backbone.schedule, path / "scheduler")


def compare_schedule(schedule: NoiseSchedule, folder: Path) -> None:
    """The file's own scheduler, made a DDIMScheduler as diffusers' users do it."""
    name = json.loads((folder / "scheduler_config.json").read_text())["_class_name"]
    own = {"DDIMScheduler": DDIMScheduler, "DDPMScheduler": DDPMScheduler, "PNDMScheduler": PNDMScheduler}[
        name
    ].from_pretrained(folder)
    theirs: Any = DDIMScheduler.from_config(own.config)
    ours = schedule.scheduler()
    assert torch.equal(ours.alphas_cumprod, own.alphas_cumprod)
    assert float(ours.final_alpha_cumprod) == float(theirs.final_alpha_cumprod)
    sample = 3 * torch.randn(1, 2, 4, 4, generator=torch.Generator().manual_seed(1))
    for steps in STEPS:
        if steps > schedule.train_timesteps:
            continue
        theirs.set_timesteps(steps)
        if (
            len(theirs.timesteps) != steps
            or not 0 <= int(theirs.timesteps.min()) <= int(theirs.timesteps.max()) < schedule.train_timesteps
        ):
            continue  # what diffusers itself cannot sample is the sampler's to refuse
        ours = schedule.scheduler(steps)
        assert torch.equal(ours.timesteps, theirs.timesteps)
        sampler = Sampler(schedule, steps, 1.0)
        context = torch.zeros(1, 1, 1)
        for index, timestep in enumerate(theirs.timesteps):
            output = torch.cos(sample + float(timestep))
            wanted = theirs.step(output, timestep, sample).prev_sample
            found = sampler.step(lambda *_, output=output: output, index, sample, context, context)
            torch.testing.assert_close(found, wanted, rtol=1e-5, atol=1e-6)


def judge(case: Case, work: Path, load: Callable[[Path], Any], compare: Callable[[Any, Path], None]) -> str:
    """``same`` or ``refused``. Fails for a traceback, other numbers, or a refusal without the file and the reason."""
    case.change(work)
    try:
        loaded = load(work)
    except TrainingError as err:
        message = str(err)
        assert "\n" not in message, message
        assert str(work) in message, message
        assert any(name in message for name in case.names) or "tensors" in message, (
            f"{message} names none of {case.names}"
        )
        return "refused"
    compare(loaded, work)
    return "same"


def run_cases(
    title: str,
    cases: list[Case],
    base: Path,
    tmp_path: Path,
    load: Callable[[Path], Any],
    compare: Callable[[Any, Path], None],
) -> None:
    """Draw and judge; prints the seed and the outcome, and every case that failed."""
    chosen = cases if CASES == 0 else random.Random(SEED).sample(cases, min(CASES, len(cases)))
    outcomes: collections.Counter[str] = collections.Counter()
    failures = []
    for index, case in enumerate(chosen):
        work = tmp_path / str(index)
        shutil.copytree(base, work)
        try:
            outcomes[judge(case, work, load, compare)] += 1
        except Exception as err:
            failures.append(f"{case.label}: {type(err).__name__}: {' '.join(str(err).split())[:300]}")
        shutil.rmtree(work)
    counts = ", ".join(f"{count} {outcome}" for outcome, count in sorted(outcomes.items()))
    print(
        f"sweep {title}: DECUWATCH_SWEEP_SEED={SEED}, {len(chosen)} of {len(cases)} cases: {counts}, {len(failures)} "
        "failed"
    )
    assert not failures, f"DECUWATCH_SWEEP_SEED={SEED} DECUWATCH_SWEEP_CASES={CASES}:\n" + "\n".join(failures)
    assert outcomes["refused"]


COMBINATIONS = [
    ("unet", "kl", "ddim"),
    ("unet", "vq", "ddpm"),
    ("transformer", "kl", "ddim"),
    ("transformer2d", "movq", "pndm"),
]


@pytest.mark.parametrize("parts", COMBINATIONS, ids=lambda parts: "-".join(parts))
def test_a_diffusers_directory_is_read_as_diffusers_reads_it_or_refused(
    parts: tuple[str, str, str], tmp_path: Path
) -> None:
    base = diffusers_directory(tmp_path / "base", *parts)
    compare_with_diffusers(load_backbone(base), base)
    kinds: dict[str, Any] = {
        "unet": UNet2DConditionModel, "transformer": DiTTransformer2DModel, "vae": AutoencoderKL, "vqvae": VQModel,
        "scheduler": {"ddim": DDIMScheduler, "ddpm": DDPMScheduler, "pndm": PNDMScheduler}[parts[2]],
    }  # fmt: skip
    cases: list[Case] = []
    for folder, kind in kinds.items():
        if not (base / folder).exists():
            continue
        name = "scheduler_config.json" if folder == "scheduler" else "config.json"
        cases += field_cases(f"{folder}/{name}", kind, json.loads((base / folder / name).read_text()))
        if folder != "scheduler":
            cases += tensor_cases(folder, load_file(base / folder / STEM))
    run_cases("-".join(parts), cases, base, tmp_path, load_backbone, compare_with_diffusers)


COMPVIS_KEYS = {
    "": compvis.PARAMETERS,
    "unet_config.": compvis.MODEL_KEYS,
    "unet_config.params.": compvis.UNET_PARAMETERS,
    "first_stage_config.": compvis.MODEL_KEYS,
    "first_stage_config.params.": compvis.VQ_PARAMETERS,
    "first_stage_config.params.ddconfig.": compvis.DDCONFIG,
    "cond_stage_config.": compvis.MODEL_KEYS,
    "cond_stage_config.params.": compvis.CLASS_EMBEDDER,
}
CARRIED_OUT = {
    "timesteps", "beta_schedule", "linear_start", "linear_end", "parameterization", "scale_factor", "image_size",
    "num_heads", "num_head_channels", "attention_resolutions",
}  # fmt: skip
"""Keys with several supported values for one checkpoint; another value of any other key changes nothing, or is refused.
"""
DEFAULTS = compvis.DEFAULTS | compvis.UNET_DEFAULTS


def compvis_cases() -> Iterator[Case]:
    """Each key of CompVis' tables dropped and replaced, and keys that do not exist."""
    content = compvis_configuration()
    content["model"]["params"]["cond_stage_config"] = CLASS_EMBEDDER

    def changed(prefix: str, name: str, change: Callable[[dict[str, Any]], Any]) -> Callable[[Path], None]:
        def apply(path: Path) -> None:
            found = copy.deepcopy(content)
            place = found["model"]["params"]
            for key in prefix.split(".")[:-1]:
                place = place[key]
            change(place)
            (path / "config.yaml").write_text(yaml.safe_dump(found))

        return apply

    for prefix, rules in COMPVIS_KEYS.items():
        place = content["model"]["params"]
        for key in prefix.split(".")[:-1]:
            place = place[key]
        for name in [*rules, "unknown", "ch_mult"]:
            if name in place:
                yield Case(
                    f"{prefix}{name}: dropped", changed(prefix, name, lambda found, name=name: found.pop(name)), (name,)
                )
            for value in [
                *replacements(place.get(name, DEFAULTS.get(name))),
                "cosine",
                "sqrt_linear",
                "x0",
                "v",
                "edm",
            ]:
                yield Case(
                    f"{prefix}{name} = {value!r}",
                    changed(prefix, name, lambda found, name=name, value=value: found.update({name: value})),
                    (name,),
                )


CLASS_EMBEDDER = {"target": "ldm.modules.encoders.modules.ClassEmbedder", "params": {"embed_dim": 16, "n_classes": 7}}


@torch.no_grad()
def outputs(backbone: Backbone) -> list[Tensor]:
    generator = torch.Generator().manual_seed(2)
    latent, context = torch.randn(2, 2, 4, 4, generator=generator), torch.randn(2, 1, 16, generator=generator)
    prediction = backbone.denoiser(latent, torch.tensor([1, 50]), context)
    return [
        prediction,
        backbone.decode(latent),
        backbone.encode(backbone.autoencoder(latent)),
        backbone.schedule.scheduler().alphas_cumprod,
    ]


def test_a_compvis_checkpoint_is_what_its_configuration_says_or_refused(tmp_path: Path) -> None:
    base = tmp_path / "base"
    base.mkdir()
    names = LatentDiffusionNames()
    names.unet()
    names.first_stage()
    names.state["cond_stage_model.embedding.weight"] = names.random(7, 16)
    save_file(names.state, base / "model.safetensors")
    cases = list(compvis_cases())
    (base / "config.yaml").write_text(yaml.safe_dump(compvis_configuration()))
    plain = load_backbone(base / "model.safetensors", base / "config.yaml")
    wanted = outputs(plain)

    def compare(backbone: Backbone, path: Path) -> None:
        stated = yaml.safe_load((path / "config.yaml").read_text())["model"]["params"]
        original = compvis_configuration()["model"]["params"]
        both = [(stated, original), (stated["unet_config"]["params"], original["unet_config"]["params"])]
        if any(
            here.get(key, DEFAULTS.get(key)) != there.get(key, DEFAULTS.get(key))
            for here, there in both
            for key in CARRIED_OUT
        ):
            return  # test_backbone.py holds each of these against CompVis' formulas
        for found, expected in zip(outputs(backbone), wanted, strict=True):
            assert torch.equal(found, expected)
        assert backbone.schedule == plain.schedule
        assert (backbone.scale, backbone.latent_shape, backbone.context_dim) == (
            plain.scale,
            plain.latent_shape,
            plain.context_dim,
        )

    run_cases(
        "compvis",
        cases,
        base,
        tmp_path,
        lambda path: load_backbone(path / "model.safetensors", path / "config.yaml"),
        compare,
    )
