"""How far a deployment's results lie from the reference's, and whether that is rounding or an error."""

from dataclasses import dataclass

import numpy as np

from moe_jax.compare.measure import Measurement, Outputs
from moe_jax.deployments.placement import PlacementError, check_one_expert_per_device


@dataclass(frozen=True)
class Tolerance:
    """Largest differences that pass, relative to the reference's largest value."""

    loss: float
    logits: float
    gradients: float
    same_text: bool
    """Whether generated text must be equal: not where rounding alone may tip the choice of a token."""


# bfloat16 keeps 8 bits: the router then chooses another expert wherever two are nearly equal (0.7% of the
# choices of an untrained model, whose logits differ there by 0.3 of the largest). It shows gross errors only.
TOLERANCES = {
    "float64": Tolerance(1e-10, 1e-10, 1e-10, same_text=True),
    "float32": Tolerance(1e-5, 1e-5, 1e-5, same_text=True),
    "bfloat16": Tolerance(1e-2, 0.5, 0.5, same_text=False),
}


@dataclass(frozen=True)
class Difference:
    """The results of a deployment against the reference; 0 is equal, NaN or infinite values give NaN."""

    terms: dict[str, float]
    """Relative difference of the loss and each of its terms."""
    max_logit: float
    """Largest |difference| of two logits."""
    max_logit_relative: float
    """The same over the reference's largest |logit|."""
    max_logit_at: tuple[int, int, int]
    """Where it is: sequence, position, token id."""
    gradients: dict[str, float]
    """For each parameter, max |difference| over max |reference|."""
    experts_equal: float
    """Share of (layer, token) pairs whose chosen experts are the same, in any order."""
    text_equal: float | None
    """Share of prompts after which the same tokens were generated; None if none were."""

    @property
    def worst_gradient(self) -> tuple[str, float]:
        """The parameter whose gradient differs most, and by how much."""
        return max(self.gradients.items(), key=lambda item: np.inf if np.isnan(item[1]) else item[1])


def difference(outputs: Outputs, reference: Outputs) -> Difference:
    """Compare two deployments' results; arrays come to the host one at a time."""
    terms = {
        name: relative_difference(np.asarray(value), np.asarray(reference.terms[name]))
        for name, value in outputs.terms.items()
    }
    logits, expected = np.asarray(outputs.logits_BLV), np.asarray(reference.logits_BLV)
    gap = np.abs(logits - expected)
    at = np.unravel_index(np.argmax(gap), gap.shape)  # a NaN counts as the largest
    assert outputs.gradients.keys() == reference.gradients.keys(), "other parameters"
    return Difference(
        terms=terms,
        max_logit=float(gap[at]),
        max_logit_relative=relative_difference(logits, expected),
        max_logit_at=(int(at[0]), int(at[1]), int(at[2])),
        gradients={
            name: relative_difference(np.asarray(array), np.asarray(reference.gradients[name]))
            for name, array in outputs.gradients.items()
        },
        experts_equal=float(np.mean(np.all(outputs.experts_NTK == reference.experts_NTK, axis=-1))),
        text_equal=_text_equal(outputs.generated_BL, reference.generated_BL),
    )


def relative_difference(array: np.ndarray, reference: np.ndarray) -> float:
    """max |array - reference| over max |reference|.

    NaN if a value is not finite, infinite where the reference is all zeros and the array is not.
    """
    if array.dtype.itemsize < 4:
        array, reference = array.astype(np.float32), reference.astype(np.float32)
    if not (np.all(np.isfinite(array)) and np.all(np.isfinite(reference))):
        return float("nan")
    gap, scale = float(np.max(np.abs(array - reference))), float(np.max(np.abs(reference)))
    if scale == 0:
        return 0.0 if gap == 0 else float("inf")
    return gap / scale


def failures(
    measurement: Measurement, found: Difference | None, tolerance: Tolerance, reference: str
) -> list[str]:
    """What does not hold of a deployment, a sentence each; `found` is None for the reference itself."""
    name = measurement.deployment.name
    lines = _placement_failures(measurement)
    if not np.isfinite(measurement.terms["loss"]):
        lines.append(f"{name}: the loss is {measurement.terms['loss']}")
    if found is None:
        return lines
    if hint := _tie_hint(found):
        hint = f"; {hint}"
    for term, value in found.terms.items():
        if not value <= tolerance.loss:
            lines.append(
                f"{name}: {term} differs from {reference} by {value:.1e}, allowed {tolerance.loss:.1e}"
            )
    if not found.max_logit_relative <= tolerance.logits:
        sequence, position, token = found.max_logit_at
        lines.append(
            f"{name}: logits differ from {reference} by {found.max_logit_relative:.1e} of the largest, "
            f"allowed {tolerance.logits:.1e} (most in sequence {sequence}, position {position}, "
            f"token id {token}){hint}"
        )
    parameter, value = found.worst_gradient
    if not value <= tolerance.gradients:
        bad = sum(not one <= tolerance.gradients for one in found.gradients.values())
        lines.append(
            f"{name}: gradients of {bad} of {len(found.gradients)} parameters differ from {reference}, most "
            f"{parameter} by {value:.1e} of its largest, allowed {tolerance.gradients:.1e}{hint}"
        )
    if tolerance.same_text and found.text_equal is not None and found.text_equal < 1:
        lines.append(
            f"{name}: generated text equals that of {reference} for {found.text_equal:.0%} of the prompts"
        )
    return lines


def _placement_failures(measurement: Measurement) -> list[str]:
    """A deployment with as many expert devices as experts, and no tensor axis, promises one on each."""
    deployment, placement = measurement.deployment, measurement.placement
    if deployment.expert != placement.num_experts or deployment.tensor > 1:
        return []
    try:
        check_one_expert_per_device(placement)
    except PlacementError as error:
        return [f"{deployment.name}: {error}"]
    return []


def _tie_hint(found: Difference) -> str:
    """Near ties of the router explain large differences in a few tokens, and no others."""
    if found.experts_equal == 1 or not 1 - found.experts_equal < 0.02:
        return ""
    return (
        f"{1 - found.experts_equal:.2%} of the choices of experts differ, perhaps near ties that rounding "
        f"tipped: --dtype float64 tells"
    )


def _text_equal(generated_BL: np.ndarray | None, reference_BL: np.ndarray | None) -> float | None:
    if generated_BL is None or reference_BL is None:
        return None
    return float(np.mean(np.all(generated_BL == reference_BL, axis=1)))
