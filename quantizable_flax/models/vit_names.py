"""What ViT's weights are called by transformers, by the original (`alpha`), and by timm."""

from quantizable_flax.models.weights import (
    Batched,
    Gate,
    Names,
    Part,
    Patches,
    Stored,
    WeightNames,
    below,
)

START = "{root}embeddings."
# Within a layer, what release 5 calls otherwise than 4.
RENAMED = {
    "attention/query": ("attention.q_proj", "attention.attention.query"),
    "attention/key": ("attention.k_proj", "attention.attention.key"),
    "attention/value": ("attention.v_proj", "attention.attention.value"),
    "attention/output": ("attention.o_proj", "attention.output.dense"),
    "attention/gate": ("attention.alpha", "attention.attention.alpha"),
    "ffn_in": ("mlp.fc1", "intermediate.dense"),
    "ffn_out": ("mlp.fc2", "output.dense"),
}


def _transformers(
    source: str, layers: str, first: int, alone: bool, distillation: str
) -> WeightNames:
    """Both releases are read whichever of the two names a module has; `first` is written.

    An encoder `alone` is saved without a root. With a distillation token it is a DeiT.
    """
    deit = distillation != "none"
    classifier = "cls_classifier" if distillation == "head" else "classifier"
    whole = "DeiTForImageClassification" if deit else "ViTForImageClassification"
    renamed = {path: (pair[first], pair[1 - first]) for path, pair in RENAMED.items()}
    layer: dict[str, Names | Stored] = {
        **renamed,
        "attention/gate": Gate(renamed["attention/gate"]),
        "attention_layer_norm": "layernorm_before",
        "ffn_layer_norm": "layernorm_after",
    }
    return WeightNames(
        source=source,
        anchor="embeddings.patch_embeddings.projection.weight",
        roots=("",) if alone else ("deit." if deit else "vit.", ""),
        heads={"head": (classifier, whole)},
        names={
            "embeddings/patch_embedding": Patches(f"{START}patch_embeddings.projection"),
            "embeddings/cls_token": Batched(f"{START}cls_token"),
            "embeddings/distillation_token": Batched(f"{START}distillation_token"),
            "embeddings/position_table": Batched(f"{START}position_embeddings"),
            "embeddings/patch_layer_norm": f"{START}layernorm",
            "embeddings/register_tokens": Batched(f"{START}register_tokens"),
            "final_layer_norm": "{root}layernorm",
            "head": classifier,
            "distillation_head": "distillation_classifier",
            **below("layer_{i}/", f"{{root}}{layers}.{{i}}.", layer),
        },
        unused=("{root}pooler.dense.weight", "{root}pooler.dense.bias"),
    )


TIMM = WeightNames(
    source="timm",
    anchor="patch_embed.proj.weight",
    names={
        "embeddings/patch_embedding": Patches("patch_embed.proj"),
        "embeddings/cls_token": Batched("cls_token"),
        "embeddings/distillation_token": Batched("dist_token"),
        "embeddings/position_table": Batched("pos_embed"),
        "embeddings/patch_layer_norm": "patch_embed.norm",
        "final_layer_norm": "norm",
        "head": "head",
        "distillation_head": "head_dist",
        **below(
            "layer_{i}/",
            "blocks.{i}.",
            {
                "attention_layer_norm": "norm1",
                "attention/query": Part("attn.qkv", index=0, of=3),
                "attention/key": Part("attn.qkv", index=1, of=3),
                "attention/value": Part("attn.qkv", index=2, of=3),
                "attention/output": "attn.proj",
                "ffn_in": "mlp.fc1",
                "ffn_out": "mlp.fc2",
                "ffn_layer_norm": "norm2",
            },
        ),
    },
    refused={
        "layer_{i}/attention/gate": (
            "weights under timm's names have no gates, found "
            "model.attention.gate={config.gate.kind!r}: set it to none."
        ),
        "embeddings/register_tokens": (
            "timm's models with registers add positions to them or to patches alone, found "
            "model.num_registers={config.num_registers}: use weights under Hugging Face's names."
        ),
    },
)


def vit_names(alone: bool, distillation: str) -> tuple[WeightNames, ...]:
    """Of ViT's and DeiT's classes and of timm's; `alone`: of models without a head.

    `distillation` as in `VitConfig`.
    """
    return (
        _transformers("transformers", "layers", 0, alone, distillation),
        _transformers("transformers 4", "encoder.layer", 1, alone, distillation),
        TIMM,
    )
