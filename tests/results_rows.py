"""Rows as benchmarks.results keeps them, made up."""

import math

import numpy as np


def row(method, seed, fp_loss, losses, **more):
    """A row as the runner keeps it, of losses over calibration seeds."""
    return {
        "method": method,
        "seed": seed,
        "calibration_seeds": len(losses),
        "overrides": [],
        "metric": "perplexity",
        "fp": math.exp(fp_loss),
        "fp_loss": fp_loss,
        "max_inf_norm": 3.0,
        "avg_kurtosis": 4.0,
        **setting("w8a8", losses),
        "steps": 10,
        "seconds": 5.0,
        **more,
    }


def setting(name, losses):
    """What a row has of one."""
    deviation = float(np.std(losses, ddof=1)) if len(losses) > 1 else math.nan
    return {
        name: float(np.mean(np.exp(losses))),
        f"{name}_std": 0.0,
        f"{name}_loss": float(np.mean(losses)),
        f"{name}_loss_std": deviation,
    }
