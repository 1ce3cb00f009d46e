"""Attacks in Linf as loops that anybody can read, in plain PyTorch: what the real ones are held to in float64.

Each is told `at(x_adv) -> (gradient, losses [N], logits)`, in which a test writes down what the model does.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F


def ce_at(model):
    """Cross-entropy summed over the batch, differentiated by the images, on a model in whatever mode it is."""

    def at(x_adv, y):
        x_adv = x_adv.detach().requires_grad_()
        logits = model(x_adv)
        (grad,) = torch.autograd.grad(F.cross_entropy(logits, y, reduction="sum"), x_adv)
        return grad, F.cross_entropy(logits, y, reduction="none").detach(), logits.detach()

    return at


def same_points(found, expected):
    """All but for rounding, which decides what Auto-PGD does where losses tie, at the corners of a ball."""
    assert (found - expected).abs().gt(1e-9).double().mean() < 0.02


def into_ball(x_adv, x, eps):
    return torch.min(torch.max(x_adv, x - eps), x + eps).clamp(0, 1)


def pgd(at, x, start, eps, alpha, steps):
    x_adv = start
    for _ in range(steps):
        grad, _, _ = at(x_adv)
        x_adv = into_ball(x_adv + alpha * grad.sign(), x, eps)
    return x_adv


def mim(at, x, start, eps, alpha, steps, decay=1.0):
    x_adv, gathered = start, torch.zeros_like(x)
    for _ in range(steps):
        grad, _, _ = at(x_adv)
        gathered = decay * gathered + grad / grad.abs().flatten(1).sum(1).view(-1, 1, 1, 1)
        x_adv = into_ball(x_adv + alpha * gathered.sign(), x, eps)
    return x_adv


def apgd(at, x, y, clean, start, eps, steps, rho=0.75):
    """Algorithm 1 of Croce & Hein (2020) on a batch; `clean`: logits at x, by which a sample may be lost at once.

    Returns the last point that fooled the model; else x if the model is wrong there; else the point of highest loss.
    """

    def rows(mask):
        return mask.view(-1, 1, 1, 1)

    grad, loss, logits = at(start)
    x_adv = x_old = best = fooling = start
    best_loss, best_grad, last_loss = loss, grad, loss
    fooled = logits.argmax(1) != y
    step, increases = torch.full_like(loss, 2 * eps), torch.zeros_like(loss)
    loss_at_check, reduced_before = torch.full_like(loss, -torch.inf), torch.ones_like(fooled)
    interval, since = max(int(0.22 * steps), 1), 0
    for iteration in range(steps):
        z = into_ball(x_adv + rows(step) * grad.sign(), x, eps)
        a = 0.75 if iteration else 1.0
        moved = into_ball(x_adv + a * (z - x_adv) + (1 - a) * (x_adv - x_old), x, eps)
        x_old, x_adv = x_adv, moved
        grad, loss, logits = at(x_adv)
        broken = logits.argmax(1) != y
        fooling, fooled = torch.where(rows(broken), x_adv, fooling), fooled | broken
        higher = loss > best_loss
        best, best_grad = torch.where(rows(higher), x_adv, best), torch.where(rows(higher), grad, best_grad)
        best_loss, increases = torch.where(higher, loss, best_loss), increases + (loss > last_loss)
        last_loss, since = loss, since + 1
        if since == interval:
            stalls = (increases <= int(rho * interval)) | (~reduced_before & (loss_at_check >= best_loss))
            step = torch.where(stalls, step / 2, step)
            x_adv, grad = torch.where(rows(stalls), best, x_adv), torch.where(rows(stalls), best_grad, grad)
            reduced_before, loss_at_check, increases = stalls, best_loss, torch.zeros_like(loss)
            interval, since = max(interval - max(int(0.03 * steps), 1), max(int(0.06 * steps), 1)), 0
    lost = clean.argmax(1) != y
    return torch.where(rows(fooled), fooling, torch.where(rows(lost), x, best))
