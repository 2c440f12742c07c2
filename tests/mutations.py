"""Breaks the core on purpose, a line at a time, and shows whether the tests notice: `make mutations`.

Each mutation replaces a text in one module of a temporary copy, and the test files named with it are run there until
the first failure. It takes some minutes, so it is not part of CI; run it after a change of the core or of its tests.
A text that is not found is an error, which `tests/unit/test_mutations.py` finds at once: the mutation must follow the
code.
"""

from __future__ import annotations

import argparse
import os
import shutil
import subprocess
import sys
import tempfile
from collections.abc import Iterable
from pathlib import Path
from typing import NamedTuple

ROOT = Path(__file__).parents[1]
COPIED = ["lightning_gcsr", "tests/unit", "tests/reference", "tests/conftest.py", "conftest.py", "pyproject.toml"]


class Mutation(NamedTuple):
    """One fault."""

    what: str
    """The fault in words."""
    module: str
    """The module of the core that has it."""
    text: str
    """The text in this module."""
    replacement: str
    """What stands there instead."""
    tests: str
    """The test files that should notice, of tests/unit, without "test_"."""


MUTATIONS = [
    Mutation(
        "bias correction of averages left out",
        "step",
        "(1 - decay) / (1 - decay**count) if finite",
        "(1 - decay) if finite",
        "step",
    ),
    Mutation(
        "average takes in gradients that are not finite",
        "step",
        "/ (1 - decay**count) if finite else 0.0",
        "/ (1 - decay**count)",
        "regularizer",
    ),
    Mutation("sign of the tolerance turned", "step", "torch.ge(signed, -easing", "torch.ge(signed, easing", "step"),
    Mutation(
        "zero weights suppressed",
        "penalties",
        "return compared.sign().mul_(gradient)",
        "return compared.sign().mul_(gradient).sub_(1e-30)",
        "coherence",
    ),
    Mutation(
        "gate by element the wrong way round", "step", "torch.ge(signed, -easing", "torch.le(signed, -easing", "step"
    ),
    Mutation(
        "product instead of sign, which vanishes for tiny numbers",
        "penalties",
        "compared.sign().mul_(gradient)",
        "compared.mul(gradient)",
        "coherence",
    ),
    Mutation(
        "complex conjugate forgotten", "penalties", "compared.sgn().conj()", "compared.sgn()", "tensor_kinds coherence"
    ),
    Mutation(
        "tolerance without the relative strength",
        "step_plan",
        "self._tolerance * chunk.strength",
        "self._tolerance * self.pull.strength",
        "step",
    ),
    Mutation(
        "injection without the relative strength",
        "step_plan",
        "scale * chunk.strength)",
        "scale * self.pull.strength)",
        "step",
    ),
    Mutation(
        "injection without the loss scale",
        "step_plan",
        "gate, scale * chunk.strength)",
        "gate, 1.0 * chunk.strength)",
        "regularizer",
    ),
    Mutation(
        "loss scale left in the measured gradient",
        "step_plan",
        "unscaled(scaled, self.loss_scale)",
        "unscaled(scaled, 1.0)",
        "regularizer",
    ),
    Mutation(
        "loss scale left in the mean squares",
        "step_plan",
        "accumulation_dtype(self.device)), self.loss_scale)",
        "accumulation_dtype(self.device)), 1.0)",
        "regularizer",
    ),
    Mutation(
        "previous gradient kept before it is compared",
        "step_plan",
        "close(gate, on_device(finite, chunk.device) & (chunk.count > 1) if self._temporal else finite)",
        "close(gate, finite)",
        "step regularizer_state",
    ),
    Mutation(
        "gates stay open at a gradient that is not finite",
        "step_plan",
        "            close(gate, on_device(finite, chunk.device) & (chunk.count > 1) if self._temporal else finite)\n",
        "",
        "regularizer step",
    ),
    Mutation(
        "predecessor not asked for at tensor and model scope",
        "step_plan",
        "return opened & (known.any()",
        "return opened | (known.any()",
        "step",
    ),
    Mutation(
        "mean squares take in gradients that are not finite",
        "step_plan",
        "square_decay(chunk.group), chunk, finite))",
        "square_decay(chunk.group), chunk, True))",
        "regularizer",
    ),
    Mutation(
        "mean squares decay under Adagrad",
        "step_plan",
        "if self.sums_squares:",
        "if False:",
        "optimizers",
    ),
    Mutation(
        "skipped steps shrink all the same",
        "step_plan",
        "acts = self.pull.acts and not skipped",
        "acts = self.pull.acts",
        "regularizer",
    ),
    Mutation(
        "found_inf of fused optimizers ignored",
        "step_plan",
        "(found_inf == 0)",
        "(found_inf >= 0)",
        "regularizer",
    ),
    Mutation(
        "closed tensors shrink too",
        "step_plan",
        "size = size * chunk.opened.to(chunk.device, dtype)",
        "size = size * 1.0",
        "step",
    ),
    Mutation(
        "latent weights do not follow replaced weights",
        "step_plan",
        "follow_replaced_weights(chunk, self.penalty)",
        "pass",
        "dual_averaging",
    ),
    Mutation(
        "κ of SGD without momentum",
        "optimizers",
        'return float((1 - group.get("dampening", 0.0)) / (1 - momentum))',
        "return 1.0",
        "optimizers",
    ),
    Mutation(
        "κ of SGD without dampening",
        "optimizers",
        '(1 - group.get("dampening", 0.0)) / (1 - momentum)',
        "1 / (1 - momentum)",
        "optimizers",
    ),
    Mutation("SGD rescales gradients", "optimizers", 'return "dampening" not in group', "return True", "optimizers"),
    Mutation(
        "latent weights keep the thresholds of closed gates growing",
        "latent_weights",
        "threshold.add_(open_share(gate, penalty, threshold.dtype), alpha=step)",
        "threshold.add_(step)",
        "dual_averaging",
    ),
    Mutation(
        "shrunk before the latent weights are new",
        "latent_weights",
        "        latent.copy_(weight)\n",
        "",
        "step",
    ),
    Mutation(
        "thresholds replaced instead of added to",
        "latent_weights",
        "threshold.add_(step)",
        "threshold.fill_(step)",
        "step",
    ),
    Mutation(
        "blocks sorted without their thresholds",
        "coupled_penalty",
        "self._over_blocks(norms - thresholds, norms, thresholds)",
        "self._over_blocks(norms, norms, thresholds)",
        "coupled_penalty",
    ),
    Mutation(
        "zero blocks kept at the edge",
        "sparsity_controller",
        "self.margin = 2 * max(self.margin, self.reach)",
        "self.margin = 0.0",
        "coupled_penalty",
    ),
    Mutation(
        "latent weights follow to the weight without its threshold",
        "penalties",
        "follows = weight + self.group_mean(step) * self.gradient(weight)",
        "follows = weight",
        "dual_averaging",
    ),
    Mutation(
        "latent weights lost before the optimizer's step",
        "latent_weights",
        '    if "latent" in chunk.kept:\n        chunk.put_kept_weight("latent")',
        '    if "latent" in chunk.kept:\n        pass',
        "step",
    ),
    Mutation(
        "soft threshold by twice the step",
        "penalties",
        "return weight.clamp(-limit, limit)",
        "return weight.clamp(-2 * limit, 2 * limit)",
        "penalties",
    ),
    Mutation(
        "group lasso without the size of groups",
        "penalties",
        "return math.sqrt(weight.numel() / max(1, weight.shape[self.dim]))",
        "return 1.0",
        "penalties",
    ),
    Mutation(
        "L2's proximal map without the 1",
        "penalties",
        "return weight / (1 + step)",
        "return weight / (1 + 2 * step)",
        "penalties",
    ),
    Mutation("threshold exclusive", "gate", "coherence >= (self.threshold", "coherence > (self.threshold", "gate"),
    Mutation("gate open at gradients that are not finite", "gate", "& statistics.finite", "", "gate"),
    Mutation("cosine not clamped", "coherence", ".clamp(-1.0, 1.0)", "", "coherence"),
    Mutation(
        "cosine of a zero gradient is NaN",
        "coherence",
        "torch.where(norms == 0, 0.0, product / norms)",
        "(product / norms)",
        "coherence",
    ),
    Mutation("warm-up a step late", "schedule", "done += 1", "done += 0", "schedule"),
    Mutation(
        "stop ignored", "schedule", "and not (self.stop is not None and clock.reached(self.stop))", "", "schedule"
    ),
    Mutation(
        "averages not restored",
        "step_plans",
        "put_kept(chunks, name, what, local_part(value))",
        "pass",
        "regularizer_state",
    ),
    Mutation(
        "latent weights of a resume taken for replaced ones",
        "step_plans",
        "chunk.versions = chunk.weight_versions()",
        "chunk.versions = []",
        "regularizer_state dual_averaging",
    ),
    Mutation(
        "loaded optimizer groups not followed",
        "step_plans",
        "            member.group = group",
        "            pass",
        "regularizer_state",
    ),
    Mutation(
        "chunks that lack a gradient are not taken apart",
        "step_plans",
        "if own & names and (mixed or not own <= names):",
        "if False:",
        "step",
    ),
    Mutation(
        "strength under fan-in not normalized",
        "strengths",
        "value * fan_in(parameters[name]) / mean",
        "value * fan_in(parameters[name])",
        "strengths",
    ),
    Mutation(
        "what a model asks to spare is regularized",
        "parameter_selection",
        "and not self.spared",
        "",
        "parameter_selection",
    ),
    Mutation(
        "frozen weights counted", "regularized_weights", "if parameter.requires_grad", "if True", "regularizer_state"
    ),
]


def copy_to(folder: Path) -> None:
    """A copy of what the unit tests of the core need."""
    for name in COPIED:
        target = folder / name
        target.parent.mkdir(parents=True, exist_ok=True)
        if (ROOT / name).is_dir():
            shutil.copytree(ROOT / name, target, ignore=shutil.ignore_patterns("__pycache__"))
        else:
            shutil.copy(ROOT / name, target)


def run_tests(names: Iterable[str], folder: Path, *options: str) -> subprocess.CompletedProcess[str]:
    """Run the test files of these names in the copy."""
    files = [f"tests/unit/test_{name}.py" for name in names]
    command = [sys.executable, "-m", "pytest", "-q", "-p", "no:cacheprovider", "--no-header", *options, *files]
    environment = os.environ | {"PYTHONPATH": str(folder), "OMP_NUM_THREADS": "1", "PYTHONDONTWRITEBYTECODE": "1"}
    return subprocess.run(command, cwd=folder, env=environment, capture_output=True, text=True, check=False)


def failing_anyway(mutations: Iterable[Mutation], folder: Path) -> list[str]:
    """The tests that fail without a fault, and so would prove nothing."""
    names = dict.fromkeys(name for mutation in mutations for name in mutation.tests.split())
    lines = run_tests(names, folder).stdout.splitlines()
    return [line.removeprefix("FAILED ").split(" - ")[0] for line in lines if line.startswith("FAILED ")]


def is_caught(mutation: Mutation, folder: Path, ignored: Iterable[str]) -> bool:
    """Whether a test, other than the ignored ones, fails in a copy that has this fault."""
    path = folder / "lightning_gcsr" / "core" / f"{mutation.module}.py"
    sound = path.read_text(encoding="utf-8")
    if mutation.text not in sound:
        raise SystemExit(
            f"{mutation.what}: {mutation.module}.py has no {mutation.text!r}. Let the mutation follow the code."
        )
    path.write_text(sound.replace(mutation.text, mutation.replacement), encoding="utf-8")
    try:
        result = run_tests(mutation.tests.split(), folder, "-x", *(f"--deselect={test}" for test in ignored))
    finally:
        path.write_text(sound, encoding="utf-8")
    return result.returncode == 1


def main() -> None:
    """Run all mutations, or those whose description has one of the given words."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("words", nargs="*", help="only mutations whose description has one of these words")
    words = parser.parse_args().words
    chosen = [m for m in MUTATIONS if not words or any(word in m.what for word in words)]
    missed = 0
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        copy_to(folder)
        ignored = failing_anyway(chosen, folder)
        for test in ignored:
            print(f"ignored, since it fails without a fault: {test}")
        for mutation in chosen:
            caught = is_caught(mutation, folder, ignored)
            missed += not caught
            print(f"{'caught    ' if caught else 'NOT caught'}  {mutation.module}: {mutation.what}", flush=True)
    print(f"{len(chosen) - missed} of {len(chosen)} caught")
    sys.exit(missed > 0)


if __name__ == "__main__":
    main()
