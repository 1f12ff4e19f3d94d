"""Cuts the committed subset out of the full golden set: python tests/make_goldens.py FULL_FOLDER.

The full set comes from the original PyTorch implementation (see tests/goldens/README.md). Weights
do not compress, so the subset holds one whole model and one small training run of a family (ViT: a
model alone); all others are tested where the full set lies next to the repository.
"""

import functools
import json
import re
import sys
from collections.abc import Callable
from pathlib import Path

import numpy as np

SUBSET = Path(__file__).parent / "goldens"
BERT_VARIANTS = (
    "vanilla",
    "clipped_alpha",
    "uncond_ft",
    "cond_tok_mlp_ft",
    "cond_tok_allfeat",
)
OPT_VARIANTS = ("cond_head_linear", "cond_tok_linear_clipped")
BERT_QUANT = (
    "w8a8_minmax",
    "w6a6_mse",
    "w4a8_mse",
    "w8a8_p99.9",
    "w8_only",
    "a8_only",
    "w8a8_actmse_4b",
)
OPT_QUANT = ("w8a8_minmax", "w6a6_mse", "w8a8_mse_int16_final_LN")
SITE_FIELDS = ("name", "kind", "n_bits", "on", "x_min", "x_max")

Arrays = dict[str, np.ndarray]
Cut = Callable[[Arrays, dict], tuple[Arrays, dict]]


def matching(arrays: Arrays, pattern: str) -> Arrays:
    """The arrays whose whole key matches."""
    return {key: x for key, x in arrays.items() if re.fullmatch(pattern, key)}


def only(config: dict, field: str, pattern: str) -> dict:
    """The config with those entries of one of its tables whose name matches."""
    return config | {field: {k: v for k, v in config[field].items() if re.fullmatch(pattern, k)}}


def cut_softmax(arrays, config):
    """All cases, on two of the three samples and one of the two heads."""
    return {key: x[:2, :1] for key, x in arrays.items()}, config


def cut_attention(variants, arrays, config):
    """Some variants; without the gradients of the projections' matrices and most probabilities."""
    names = "|".join(variants)
    key = rf"in/.*|({names})/(w/.*|out/(?!attn_probs).*|grad_hidden|grad/(alpha|.*bias).*)"
    return matching(arrays, rf"{key}|vanilla/out/.*"), only(config, "variants", names)


def cut_model(arrays, config):
    """Everything, but outputs of eight tokens of the first sample only."""
    return {
        k: x[:1, :8] if k.startswith("out/") and x.ndim else x for k, x in arrays.items()
    }, config


def cut_metrics(model, arrays, config):
    """The one model, and the function alone."""
    return matching(arrays, rf"({model}|kurtosis.*)/.*"), only(config, "metrics", model)


def cut_quant(cases, arrays, config):
    """Some cases; logits of eight tokens, of w8a8_minmax and fp only."""
    names = "|".join(re.escape(name) for name in cases)
    config = only(only(config, "cases", names), "sites", names)
    for name, sites in config["sites"].items():
        config["sites"][name] = [{field: site[field] for field in SITE_FIELDS} for site in sites]
    for case in config["cases"].values():
        case.pop("script_metrics", None)
    keys = rf"in/.*|({names}|fp)/loss_eval|(w8a8_minmax|fp)/logits_eval0"
    kept = matching(arrays, keys)
    return {k: x[:1, :8] if "logits" in k else x for k, x in kept.items()}, config


def cut_quantizers(arrays, config):
    """8 bits, clipped ranges, all ties; `out` follows from `int` and is kept for ties only."""
    tensors = "normal|relu|zeros|small|ln_gamma_1d"
    cases = rf"({tensors})/a?sym8/p[tc]/clip"
    fields = "int|scale|zero_point|x_min|x_max|grad_x"
    keys = rf"ties/.*|(in|cot)/({tensors})|{cases}/({fields})"
    return matching(arrays, keys), only(config, "cases", cases)


def cut_ranges(arrays, config):
    """All cases, on five of the sixteen batches."""
    whole = ("in/weight", "in/ln_gamma")
    return {key: x if key in whole else x[:5] for key, x in arrays.items()}, config


def cut_train(arrays, config):
    """Without most of the final matrices."""
    left_out = r".*(word_embeddings|position_embeddings|embed_tokens|embed_positions)|"
    left_out += r".*(key|value|dense|[kv]_proj|out_proj|fc[12])\.weight"
    return matching(arrays, rf"(in|w0|out)/.*|w1/(?!{left_out}).*"), config


CUTS: dict[str, Cut] = {
    "softmax": cut_softmax,
    "attention_bert": functools.partial(cut_attention, BERT_VARIANTS),
    "attention_opt": functools.partial(cut_attention, OPT_VARIANTS),
    "model_bert_vanilla": cut_model,
    "model_opt_vanilla": cut_model,
    "model_vit_gated": cut_model,
    "metrics_bert": functools.partial(cut_metrics, "bert_vanilla"),
    "metrics_opt": functools.partial(cut_metrics, "opt_vanilla"),
    "quant_bert_vanilla": functools.partial(cut_quant, BERT_QUANT),
    "quant_opt_vanilla": functools.partial(cut_quant, OPT_QUANT),
    "quantizers": cut_quantizers,
    "range_estimators": cut_ranges,
    "train_bert_gated": cut_train,
    "train_opt_gated": cut_train,
}


def main(full: Path) -> None:
    """Writes one file per entry of CUTS and says how large it is."""
    for name, cut in CUTS.items():
        with np.load(full / f"{name}.npz") as file:
            arrays = {key: file[key] for key in file.files if key != "config"}
            config = json.loads(str(file["config"]))
        arrays, config = cut(arrays, config)
        path = SUBSET / f"{name}.npz"
        np.savez_compressed(path, config=np.array(json.dumps(config)), **arrays)
        print(f"{path.stat().st_size:8d} {path.name}")


if __name__ == "__main__":
    main(Path(sys.argv[1]))
