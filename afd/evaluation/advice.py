"""What to do about a check that failed or warned: one sentence each, for terminal and report alike."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from typing import Any

LARGER = "accuracy at ε = "  # how the name of the check at the largest radius begins

ADVICE = {
    "outputs not finite": "Find the layer whose outputs overflow (half precision, a division, a logarithm of zero) "
    "and evaluate again: images with NaN count as wrong, and attacks cannot aim at what is infinite.",
    "random outputs": "Switch off what draws random numbers in evaluation mode, or attack the average over many draws "
    "(expectation over transformation); a single draw is not what an attacker has to beat.",
    "batch dependence": "Give BatchNorm its running statistics (`model.eval()`, `track_running_stats=True`), so that "
    "an image's class does not depend on its neighbours.",
    "training mode": "Return the model from its function in evaluation mode (`model.eval()`), and let its `train()` "
    "reach every module.",
    "probabilities instead of logits": "Let the model return what enters its last softmax; the loss takes a softmax "
    "itself.",
    "zero gradients at start": "Gradients are masked here: look for saturated outputs (divide the logits by a "
    "constant), rounding or other steps without a slope in the model, and quote {strong}.",
    "inputs outside [0, 1]": "Scale the images to [0, 1] and move their normalisation into the model, for ε is stated "
    "in these units.",
    LARGER: "No attack that works leaves so much at this radius: attack with {more} and mend what the other checks "
    "name before quoting a figure at any radius.",
    "one step beats many": "Attack with smaller steps and restarts, and quote {strong}: the iterative attacks above "
    "are misled, so their figures are too high.",
    "attack raises accuracy": "Do not quote FGSM, which the model has learned to recognise (label leaking); train "
    "against a random start or more steps, and quote {strong}.",
    "doubling the steps": "Attack with more steps and restarts until twice as many change nothing, and quote {strong}.",
    "random noise beats the attacks": "Gradients are masked: attack with {more}, and quote no figure of a gradient "
    "attack before noise breaks nothing that it leaves.",
    "Square beats white-box": "Gradients are masked: quote {strong}, whose Square needs no gradient, instead of PGD's "
    "figure, and try {more} to see whether gradients can be brought to find what Square finds.",
    "transfer beats white-box": "Gradients are masked: count the transferred images (the worst case above does), and "
    "quote {strong}.",
    "attacked images out of bounds": "Clip what that attack returns to its ball and to [0, 1], or use another version "
    "of its library; these images were not counted, so its accuracy is too high.",
    "robust to a blind attack": "Take the images without a gradient for unattacked, not for robust: quote {strong}, "
    "and look for saturation (cross-entropy of exactly zero) or steps without a slope in the model.",
    "not finite under attack": "Evaluate in float32 and find where the model overflows on attacked images: from there "
    "on an attack climbs nothing.",
    "re-verification": "Make the model answer alike at every batch size and in every call (random layers, batch "
    "statistics, half precision), and evaluate again.",
}

STRONG = "what `--protocol autoattack` leaves"
STRONGEST = "the worst case over all of AutoAttack, and no single attack's figure"
MORE = "more steps and restarts"


def advice(name: str, protocol: str) -> str:
    """What to do about a check.

    Args:
        name: of the check.
        protocol: that it was made in; one that is AutoAttack already does not send the reader there.
    """
    done = protocol in ("autoattack", "reference")
    words = ADVICE[LARGER] if name.startswith(LARGER) else ADVICE.get(name, "")
    return words.format(strong=STRONGEST if done else STRONG, more=MORE)


def advised(checks: Iterable[Mapping[str, Any]], protocol: str) -> list[tuple[str, str, str]]:
    """(name, verdict, advice) of each check of a report that failed or warned, failures first."""
    bad = [check for check in checks if check["verdict"] in ("fail", "warn")]
    bad.sort(key=lambda check: check["verdict"] != "fail")
    return [(check["name"], check["verdict"], advice(check["name"], protocol)) for check in bad]
