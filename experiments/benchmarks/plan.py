"""The arithmetic behind `experiments/SCALING.md`: what large generators cost, before they are run.

    python -m experiments.benchmarks.plan

prints the table of that page. Nothing is trained, and no array of the size of a model is made:
counts come from the shapes, floating point operations from XLA's account of the lowered programs.
What the hardware is able to do, and how much of that it will do, are assumptions, in `Hardware`.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass, replace
from math import prod
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jax.extend.core import jaxprs_in_params

from experiments.generative.config import PRESETS, Config
from experiments.generative.problem import Generator, build_generator

PyTree = Any

_PUBLISHED = PRESETS["celeba-published"]
_CARRIED = 6  # states that the loop holds: z, mu, the next and the best of both
_MOVED = 3  # traffic of an iteration over that of its convolutions: normalisations move twice that
_KERNELS = 4  # a convolution, with its normalisation and what is fused with them
_ADAM = 4  # numbers a parameter: itself, its gradient and two moments

MODELS: dict[str, tuple[tuple[int, int, int], Config]] = {
    "64x64, published": ((64, 64, 3), _PUBLISHED),
    "256x256, same widths": ((256, 256, 3), _PUBLISHED),
    "256x256, six branches": (
        (256, 256, 3),
        replace(_PUBLISHED, channels=(8, 16, 32, 64, 128, 256)),
    ),
}
"""Image shape and settings of each plan; the last has two finer, narrower branches in front."""


@dataclass(frozen=True)
class Hardware:
    """A node of eight H100 SXM, from its data sheet, and what is assumed of it.

    Attributes:
        devices: Number of GPUs.
        wide_peak: Dense operations a second in TF32, which float32 products take by default.
        narrow_peak: In bfloat16.
        bandwidth: Bytes a second from a GPU's memory.
        memory: Bytes of it.
        link: Bytes a second from each GPU to the others, one way.
        peak_share: What convolutions of few channels reach of the peak.
        bandwidth_share: What passes over memory reach of the bandwidth.
        launch: Seconds that a kernel takes at least.
    """

    devices: int = 8
    wide_peak: float = 495e12
    narrow_peak: float = 989e12
    bandwidth: float = 3.35e12
    memory: float = 80e9
    link: float = 450e9
    peak_share: float = 0.3
    bandwidth_share: float = 0.7
    launch: float = 3e-6


class Counts(NamedTuple):
    """What one image costs.

    Attributes:
        parameters: Of the whole model.
        latent_parameters: Of its linear maps from the latent to the branches.
        state: Numbers of z.
        cell_operations: Of an evaluation of the cell and its vector-Jacobian product.
        decoder_operations: Of the objective and its gradient.
        cell_traffic: Numbers that the cell's convolutions read and write, forward.
        decoder_traffic: Those of the decoder.
        convolutions: How many there are, forward.
    """

    parameters: int
    latent_parameters: int
    state: int
    cell_operations: float
    decoder_operations: float
    cell_traffic: int
    decoder_traffic: int
    convolutions: int


def count(image_shape: tuple[int, int, int], config: Config) -> Counts:
    """The counts of a multiscale generator, from a batch of one."""
    generator, params = abstract_generator(image_shape, config)
    x, z = jax.eval_shape(lambda p: generator.start(p, 1), params)
    images = jax.ShapeDtypeStruct((1, *image_shape), jnp.float32)
    problem = generator.problem

    def cell(params: PyTree, z: PyTree, x: PyTree, mu: PyTree) -> PyTree:
        fz, pull_back = jax.vjp(lambda z, x: problem.cell(params, z, x), z, x)
        return fz, pull_back(mu)

    def objective(params: PyTree, z: PyTree, x: PyTree, images: jax.Array) -> PyTree:
        value, pull_back = jax.vjp(lambda z, x: problem.objective(params, z, x, images), z, x)
        return value, pull_back(jnp.ones_like(value))

    in_cell = convolutions(problem.cell, params, z, x)
    in_decoder = convolutions(generator.decode, params, z)
    return Counts(
        parameters=numbers(params),
        latent_parameters=numbers(params["injections"]),
        state=numbers(z),
        cell_operations=operations(cell, params, z, x, z),
        decoder_operations=operations(objective, params, z, x, images),
        cell_traffic=sum(in_cell),
        decoder_traffic=sum(in_decoder),
        convolutions=len(in_cell) + len(in_decoder),
    )


def abstract_generator(
    image_shape: tuple[int, int, int], config: Config
) -> tuple[Generator, PyTree]:
    """A generator, and its parameters as shapes and dtypes."""
    built: list[Generator] = []

    def build() -> PyTree:
        generator, params = build_generator(config, image_shape, seed=0)
        built.append(generator)
        return params

    params = jax.eval_shape(build)
    return built[0], params


def numbers(tree: PyTree) -> int:
    """Numbers in all leaves."""
    return sum(prod(leaf.shape) for leaf in jax.tree.leaves(tree))


def operations(function: Callable[..., Any], *shapes: PyTree) -> float:
    """XLA's count of the floating point operations of a program, before it is compiled."""
    account = jax.jit(function).lower(*shapes).cost_analysis()
    assert account is not None, "this backend does not count operations"
    return account["flops"]


def convolutions(function: Callable[..., Any], *shapes: PyTree) -> list[int]:
    """For each convolution of a program, the numbers of its images read and written."""
    program = jax.make_jaxpr(function)(*shapes).jaxpr
    return [
        prod(equation.invars[0].aval.shape) + prod(equation.outvars[0].aval.shape)
        for equation in _equations(program)
        if equation.primitive.name == "conv_general_dilated"
    ]


def _equations(program: Any) -> Iterator[Any]:
    for equation in program.eqns:
        yield equation
        for inner in jaxprs_in_params(equation.params):
            yield from _equations(inner)


class Plan(NamedTuple):
    """What follows for one dtype of the states, decoders being float32.

    Attributes:
        image_bytes: Memory an image in a training step.
        largest_batch: Images that fit on a GPU.
        image_seconds: An iteration an image, where the batch is large.
        launch_seconds: An iteration at least, however small the batch.
        step_seconds: A training step of the published batch on each GPU.
        images_a_second: Of all GPUs, at that batch on each.
        hours: For the published number of images.
    """

    image_bytes: float
    largest_batch: int
    image_seconds: float
    launch_seconds: float
    step_seconds: float
    images_a_second: float
    hours: float


def plan(counts: Counts, config: Config, node: Hardware, *, narrow: bool) -> Plan:
    """The plan of a model, with states in bfloat16 or in float32."""
    width = 2 if narrow else 4
    peak = node.narrow_peak if narrow else node.wide_peak
    traffic = counts.cell_traffic * width + counts.decoder_traffic * 4
    # Backward in the state, an iteration moves and holds as much as forward.
    moving = 2 * _MOVED * traffic / (node.bandwidth_share * node.bandwidth)
    computing = counts.cell_operations / peak + counts.decoder_operations / node.wide_peak
    image_seconds = computing / node.peak_share + moving
    launch_seconds = 2 * _KERNELS * counts.convolutions * node.launch
    image_bytes = _CARRIED * counts.state * width + _MOVED * traffic
    room = node.memory - 4 * _ADAM * counts.parameters
    iteration = max(config.batch_size * image_seconds, launch_seconds)
    step_seconds = config.inner_steps * iteration
    speed = node.devices * config.batch_size / step_seconds
    return Plan(
        image_bytes,
        int(room // image_bytes),
        image_seconds,
        launch_seconds,
        step_seconds,
        speed,
        config.steps * config.batch_size / speed / 3600,
    )


def communication(counts: Counts, node: Hardware) -> tuple[float, float]:
    """Bytes that each GPU sends for the mean of a gradient in float32, and the seconds it takes."""
    sent = 2 * (node.devices - 1) / node.devices * 4 * counts.parameters
    return sent, sent / node.link


def rows(node: Hardware = Hardware()) -> dict[str, list[float]]:
    """The table: quantity with its unit to one number a model."""
    table: dict[str, list[float]] = {}
    for shape, config in MODELS.values():
        counts = count(shape, config)
        sent, sending = communication(counts, node)
        wide, narrow = (plan(counts, config, node, narrow=narrow) for narrow in (False, True))
        column = {
            "parameters, millions": counts.parameters / 1e6,
            "of these latent to branches, millions": counts.latent_parameters / 1e6,
            "with gradient and Adam's moments, GB": 4 * _ADAM * counts.parameters / 1e9,
            "state z, thousands of numbers an image": counts.state / 1e3,
            "cell and its product, GFLOP an iteration": counts.cell_operations / 1e9,
            "objective and its gradient, GFLOP an iteration": counts.decoder_operations / 1e9,
            "a training step, TFLOP an image": config.inner_steps
            * (counts.cell_operations + counts.decoder_operations)
            / 1e12,
            "convolutions of cell and decoder": counts.convolutions,
            "their traffic, forward, millions of numbers: cell": counts.cell_traffic / 1e6,
            "the same: decoder": counts.decoder_traffic / 1e6,
            "memory, MB an image, float32": wide.image_bytes / 1e6,
            "memory, MB an image, bfloat16 states": narrow.image_bytes / 1e6,
            "largest batch in 80 GB, float32": wide.largest_batch,
            "largest batch in 80 GB, bfloat16 states": narrow.largest_batch,
            "an iteration, microseconds an image, float32": wide.image_seconds * 1e6,
            "an iteration, microseconds an image, bfloat16 states": narrow.image_seconds * 1e6,
            "an iteration at least, microseconds, by launches": wide.launch_seconds * 1e6,
            "gradient sent by each GPU, MB a step": sent / 1e6,
            "sending, milliseconds a step": sending * 1e3,
            "a step of 48 images a GPU, seconds, float32": wide.step_seconds,
            "a step of 48 images a GPU, seconds, bfloat16 states": narrow.step_seconds,
            "images a second of 8 GPUs, float32": wide.images_a_second,
            "images a second of 8 GPUs, bfloat16 states": narrow.images_a_second,
            "hours for 35.8 million images, float32": wide.hours,
            "hours for 35.8 million images, bfloat16 states": narrow.hours,
        }
        for name, value in column.items():
            table.setdefault(name, []).append(value)
    return table


def markdown(table: dict[str, list[float]]) -> str:
    """The table as SCALING.md has it, three significant digits."""
    lines = [f"| | {' | '.join(MODELS)} |", "|---|" + "---|" * len(MODELS)]
    for name, values in table.items():
        lines.append(f"| {name} | {' | '.join(number(value) for value in values)} |")
    return "\n".join(lines)


def number(value: float) -> str:
    """Three significant digits, without an exponent."""
    return f"{float(f'{value:.3g}'):,.10g}"


if __name__ == "__main__":
    print(markdown(rows()))
