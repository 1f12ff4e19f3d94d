"""transformers makes the same inputs of texts and images as our evaluation."""

import io
import json

import numpy as np
import pytest
from PIL import Image

import quantizable_flax as qf
from quantizable_flax.data.images import crops
from quantizable_flax.data.images.decode import open_image, to_array
from quantizable_flax.data.text.tokenizer import Tokenizer
from tests.pretrained.written import made
from tests.tiny import TEXT

pytest.importorskip("torch")
transformers = pytest.importorskip("transformers", minversion="5.0")

TRAINED = {
    "bert": lambda texts: Tokenizer.train_wordpiece(texts, 100),
    "opt": lambda texts: Tokenizer.train_byte_bpe(texts, 300),
}


@pytest.mark.parametrize("family", TRAINED)
def test_texts_have_the_ids_of_our_tokenizer(family, tmp_path):
    tokenizer = TRAINED[family]([TEXT] * 20)
    model, params = made(family, vocab_size=tokenizer.vocab_size, pad_token_id=tokenizer.pad_id)
    assets = {"tokenizer": json.loads(tokenizer.to_json())}
    qf.to_huggingface(model, params, str(tmp_path), assets=assets)
    theirs = transformers.AutoTokenizer.from_pretrained(tmp_path)
    texts = ["The quick brown fox", "naïve dogs über 7 ¥!"]
    given = theirs(texts, padding=True)
    for text, ids, mask in zip(texts, given["input_ids"], given["attention_mask"], strict=True):
        own = [*tokenizer.prefix_ids, *tokenizer.encode_batch([text])[0], *tokenizer.suffix_ids]
        assert [token for token, seen in zip(ids, mask, strict=True) if seen] == own
        assert {token for token, seen in zip(ids, mask, strict=True) if not seen} <= {
            tokenizer.pad_id
        }
    assert theirs.model_max_length == model.config.max_position_embeddings
    assert theirs.mask_token_id == tokenizer.mask_id


# Of an odd border, theirs is cut half a pixel to the left of the centre and ours as in timm.
@pytest.mark.parametrize(
    ("size", "eval_crop"),
    [((16, 16), 1.0), ((16, 16), 0.5), ((53, 40), 1.0), ((49, 40), 0.875), ((31, 90), 0.875)],
)
def test_images_have_the_pixels_of_our_evaluation(size, eval_crop, tmp_path):
    model, params = made("vit", image_size=16, patch_size=4, pixel_mean=(0.1, 0.2, 0.3))
    qf.to_huggingface(model, params, str(tmp_path), eval_crop=eval_crop)
    rng = np.random.default_rng(0)
    smooth = Image.fromarray(rng.integers(0, 256, (5, 4, 3), np.uint8)).resize(size)
    file = io.BytesIO()
    smooth.save(file, "png")
    cropped = crops.centred(open_image(file.getvalue(), "x"), 16, eval_crop, 3, "x")
    ours = model.bind({"params": params}).normalise(to_array(cropped)[None])
    processor = transformers.AutoImageProcessor.from_pretrained(tmp_path)
    theirs = processor(smooth, return_tensors="np")["pixel_values"].transpose(0, 2, 3, 1)
    np.testing.assert_allclose(ours, theirs, rtol=0, atol=1e-5)
