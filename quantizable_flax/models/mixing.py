"""Mixup (arXiv 1710.09412) and CutMix (arXiv 1905.04899) of a batch with its own reverse."""

import jax
import jax.numpy as jnp


def mix(
    images_BxHxWxC: jax.Array,
    key: jax.Array,
    *,
    mixup_alpha: float,
    cutmix_alpha: float,
    cutmix_share: float,
    probability: float,
) -> tuple[jax.Array, jax.Array]:
    """Returns the mixed float images and the weight of each image's own label, a scalar.

    One draw serves the whole batch: with `probability` it is mixed, by CutMix for `cutmix_share`
    of the mixed batches (always or never where only one alpha is above 0), with weight
    Beta(alpha, alpha); example i meets example B - 1 - i. The label of the partner weighs the rest.
    """
    apply_key, kind_key, mixup_key, cutmix_key, box_key = jax.random.split(key, 5)
    partner_BxHxWxC = images_BxHxWxC[::-1]
    if not cutmix_alpha:
        mixed, own = mixup(images_BxHxWxC, partner_BxHxWxC, _beta(mixup_key, mixup_alpha))
    else:
        mixed, own = cutmix(
            images_BxHxWxC, partner_BxHxWxC, _beta(cutmix_key, cutmix_alpha), box_key
        )
        if mixup_alpha:
            other, other_own = mixup(images_BxHxWxC, partner_BxHxWxC, _beta(mixup_key, mixup_alpha))
            cut = jax.random.bernoulli(kind_key, cutmix_share)
            mixed, own = jnp.where(cut, mixed, other), jnp.where(cut, own, other_own)
    applied = jax.random.bernoulli(apply_key, probability)
    return jnp.where(applied, mixed, images_BxHxWxC), jnp.where(applied, own, 1.0)


def mixup(images: jax.Array, partners: jax.Array, own: jax.Array) -> tuple[jax.Array, jax.Array]:
    """`own * images + (1 - own) * partners`, and `own`."""
    return own * images + (1.0 - own) * partners, own


def cutmix(
    images_BxHxWxC: jax.Array, partners_BxHxWxC: jax.Array, own: jax.Array, key: jax.Array
) -> tuple[jax.Array, jax.Array]:
    """Pastes a box of the partners, and returns the share of the image that was left.

    The box has `1 - own` of the area and a centre anywhere, so the border may cut it; the share
    is counted after that.
    """
    _, height, width, _ = images_BxHxWxC.shape
    side = jnp.sqrt(1.0 - own)
    y_key, x_key = jax.random.split(key)

    def inside(key: jax.Array, size: int) -> jax.Array:
        centre = jax.random.randint(key, (), 0, size)
        half = (size * side).astype(jnp.int32) // 2
        place = jnp.arange(size)
        return (centre - half <= place) & (place < centre + half)

    box_HxW = inside(y_key, height)[:, None] & inside(x_key, width)[None, :]
    mixed = jnp.where(box_HxW[None, :, :, None], partners_BxHxWxC, images_BxHxWxC)
    return mixed, 1.0 - jnp.mean(box_HxW.astype(jnp.float32))


def _beta(key: jax.Array, alpha: float) -> jax.Array:
    return jax.random.beta(key, alpha, alpha)
