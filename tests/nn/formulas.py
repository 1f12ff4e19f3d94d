"""Attention with all its methods by loops and float64, from the papers' formulas alone."""

from typing import Any

import numpy as np


def sigmoid(x: np.ndarray) -> np.ndarray:
    return 1.0 / (1.0 + np.exp(-x))


def dense(params: dict[str, np.ndarray], x: np.ndarray) -> np.ndarray:
    return x @ params["kernel"] + params["bias"]


def rms_normed(scale_K: np.ndarray, x: np.ndarray) -> np.ndarray:
    return scale_K * x / np.sqrt(np.mean(x**2, axis=-1, keepdims=True) + 1e-6)


def row(scores: np.ndarray, seen: np.ndarray, sink: float | None, options: dict) -> np.ndarray:
    """Probabilities of the keys of one query, 0 for those that it does not see."""
    probs = np.zeros_like(scores)
    if not seen.any():
        return probs
    exps = np.exp(scores[seen])
    probs[seen] = exps / (exps.sum() + (0.0 if sink is None else np.exp(sink)))
    if options.get("softmax") != "clipped":
        return probs
    gamma, zeta = options.get("gamma", 0.0), options.get("zeta", 1.0)
    if options.get("length_normalised"):
        gamma = -options["alpha"] / seen.sum()
    return np.where(seen, np.clip((zeta - gamma) * probs + gamma, 0.0, 1.0), 0.0)


def gate(params: dict[str, np.ndarray], kind: str, x: np.ndarray, v: np.ndarray, head: int) -> Any:
    """The logit of a head at one token, given all of x [D] and the head's own values [K]."""
    if kind == "value":
        return params["kernel"][head] @ v + params["bias"][head]
    assert kind == "elementwise"
    return x @ params["kernel"][:, head] + params["bias"][head]  # [K]


def attention(
    params: dict[str, Any], x_BxTxD: np.ndarray, seen_BxTxT: np.ndarray, heads: int, options: dict
) -> np.ndarray:
    """[B, T, D] by options of `model.attention`; a pooled gate sees what the first query does."""
    batch, tokens, width = x_BxTxD.shape
    size = width // heads
    out = np.zeros_like(x_BxTxD)
    for b in range(batch):
        x = x_BxTxD[b]
        context = np.zeros((tokens, heads, size))
        for h in range(heads):
            part = slice(h * size, (h + 1) * size)
            q, k, v = (dense(params[name], x)[:, part] for name in ("query", "key", "value"))
            if options.get("qk_norm"):
                q = rms_normed(params["query_norm"]["scale"], q)
                k = rms_normed(params["key_norm"]["scale"], k)
            sink = {"zero": 0.0, "none": None}.get(options.get("sink", "none"))
            if options.get("sink") == "learned":
                sink = params["sink"][h]
            for t in range(tokens):
                probs = row(k @ q[t] / np.sqrt(size), seen_BxTxT[b, t], sink, options)
                context[t, h] = probs @ v
            if "gate" in options:
                kind, its = options["gate"], params["gate"]
                logits = [gate(its, kind, x[t], v[t], h) for t in range(tokens)]
                if options.get("gate_pooling") == "visible":
                    visible = np.flatnonzero(seen_BxTxT[b, 0])
                    logits = [np.mean([logits[s] for s in visible], axis=0)] * tokens
                scale = 1.0 / options["gate_pi_init"] if options.get("gate_finetune") else 1.0
                context[:, h] *= scale * sigmoid(np.array(logits).reshape(tokens, -1))
        out[b] = dense(params["output"], context.reshape(tokens, width))
    return out
