"""Bytes of images: the processor's own, kept while there is room."""

from dataclasses import replace

import pytest
import torch
from PIL import Image

from fsc147lib.data.faults import DataError
from fsc147lib.data.fsc147 import FSC147
from fsc147lib.model import collate
from fsc147lib.model.collate import Collate, PixelStore
from fsc147lib.model.forward import normalised_pixels


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


@pytest.fixture
def samples(root, tmp_path):
    """Two, whose files may be removed."""
    copies = []
    for sample in list(FSC147(root, "train"))[:2]:
        sample.image.save(tmp_path / sample.name, quality=95)
        copies.append(replace(sample, image_path=tmp_path / sample.name))
    return copies


def test_an_image_is_decoded_once(tiny, samples):
    store = PixelStore(tiny.image_processor)
    first = [store.patches(sample).clone() for sample in samples]
    mirrored = store.patches(samples[0].flipped())
    for sample in samples:
        sample.image_path.unlink()
    assert all(torch.equal(store.patches(sample), kept) for sample, kept in zip(samples, first, strict=True))
    assert torch.equal(store.patches(samples[0].flipped()), mirrored)


@pytest.mark.parametrize("images", [0, 1])
def test_only_so_many_images_are_kept_as_have_room(tiny, samples, images):
    """Of two: half of the free memory has room for `images`."""
    sizes = [processed(sample, tiny).nbytes for sample in samples]
    store = PixelStore(tiny.image_processor, room=sum(sizes[:images]))
    for sample in samples:
        assert torch.equal(store.patches(sample), processed(sample, tiny))
        sample.image_path.unlink()
    for i, sample in enumerate(samples):
        if i < images:
            store.patches(sample)
        else:
            with pytest.raises(DataError):
                store.patches(sample)


def test_half_of_the_free_memory_is_room(tiny, monkeypatch):
    monkeypatch.setattr(collate, "free_memory", lambda: 1000)
    assert PixelStore(tiny.image_processor).room == 500


def test_mirror_images_are_within_two_grey_levels(tiny, mixed_samples):
    """Mirrored after resizing instead of before."""
    store = PixelStore(tiny.image_processor)
    for sample in mixed_samples:
        wanted = processed(sample.flipped(), tiny)
        assert (store.patches(sample.flipped()).int() - wanted.int()).abs().max() <= 2


def test_an_image_that_the_processor_refuses_is_named(tiny, root, tmp_path):
    path = tmp_path / "strip.png"
    Image.new("RGB", (3000, 10)).save(path)
    sample = replace(FSC147(root, "train")[0], image_path=path)
    with pytest.raises(DataError, match="refuses .*strip.png"):
        Collate(tiny.tokenizer, tiny.image_processor).lengths(sample)
