"""Bytes of images: the processor's own, read once, shared between workers."""

from dataclasses import replace

import pytest
import torch
from PIL import Image
from torch.utils.data import DataLoader

from fsc147lib.data.faults import DataError
from fsc147lib.data.fsc147 import FSC147
from fsc147lib.data.samples import Picture
from fsc147lib.model import pixels
from fsc147lib.model.collate import Collate
from fsc147lib.model.forward import normalised_pixels
from fsc147lib.model.pixels import PixelStore


def test_pixels_are_the_processor_s(tiny, mixed_samples):
    batch = Collate(tiny.tokenizer, tiny.image_processor)(mixed_samples)
    expected = tiny.image_processor(images=[sample.image for sample in mixed_samples], return_tensors="pt")
    torch.testing.assert_close(normalised_pixels(batch), expected["pixel_values"], atol=1e-6, rtol=0)
    assert torch.equal(batch["image_grid_thw"], expected["image_grid_thw"])


def processed(sample, model):
    """Patches of an image as the library's processor makes them, as bytes, one frame of the two."""
    processor = model.image_processor
    pixels = processor(images=[sample.image], return_tensors="pt", do_rescale=False, do_normalize=False)["pixel_values"]
    return pixels.unflatten(1, (3, 2, -1))[:, :, 0].flatten(1).to(torch.uint8)


def copies(root, folder, number):
    """Samples whose files may be removed."""
    samples = []
    for sample in list(FSC147(root, "train"))[:number]:
        path = folder / sample.name
        sample.image.save(path, quality=95)
        samples.append(replace(sample, image_path=path))
    return samples


def test_an_image_is_decoded_once(tiny, root, tmp_path):
    samples = copies(root, tmp_path, 2)
    store = PixelStore(samples, tiny.image_processor)
    first = [store.patches(sample).clone() for sample in samples]
    mirrored = store.patches(samples[0].flipped())
    for sample in samples:
        sample.image_path.unlink()
    assert all(torch.equal(store.patches(sample), kept) for sample, kept in zip(samples, first, strict=True))
    assert torch.equal(store.patches(samples[0].flipped()), mirrored)


def test_mirror_images_are_within_a_grey_level(tiny, mixed_samples):
    """Mirrored after resizing instead of before."""
    store = PixelStore(mixed_samples, tiny.image_processor)
    for sample in mixed_samples:
        wanted = processed(sample.flipped(), tiny)
        assert (store.patches(sample.flipped()).int() - wanted.int()).abs().max() <= 2


def test_nothing_is_kept_where_there_is_no_room(tiny, root, tmp_path, monkeypatch):
    monkeypatch.setattr(pixels, "free_memory", lambda: 0)
    (sample,) = copies(root, tmp_path, 1)
    store = PixelStore([sample], tiny.image_processor)
    assert torch.equal(store.patches(sample), processed(sample, tiny)) and not store.places
    sample.image_path.unlink()
    with pytest.raises(DataError):
        store.patches(sample)


def test_workers_share_what_they_decode(tiny, root):
    samples = list(FSC147(root, "train"))[:6]
    store = PixelStore(samples, tiny.image_processor, shared=True)
    collate = Collate(tiny.tokenizer, tiny.image_processor, store)
    batches = list(DataLoader(samples[:4], 2, collate_fn=collate, num_workers=2))
    assert store.holds(samples[:4]) and store.holds([samples[0].flipped()])
    assert not store.holds(samples[3:5]) and not store.holds([Picture(samples[0].image_path, "apples")])
    plain = Collate(tiny.tokenizer, tiny.image_processor)(samples[:2])
    assert torch.equal(batches[0]["pixel_values"], plain["pixel_values"])


def test_an_image_that_the_processor_refuses_is_named(tiny, root, tmp_path):
    path = tmp_path / "strip.png"
    Image.new("RGB", (3000, 10)).save(path)
    sample = replace(FSC147(root, "train")[0], image_path=path)
    with pytest.raises(DataError, match="refuses .*strip.png"):
        PixelStore([sample], tiny.image_processor)
