"""A page is one buffer with every field of its parameters."""

import torch

from halfbyte.memory.pages import Field, Page

FIELDS = (Field("code", torch.uint8), Field("scale", torch.float32, 256))


def page_of(start, stop):
    nbytes = sum(field.nbytes(stop - start) for field in FIELDS)
    return Page(start, stop, torch.zeros(nbytes, dtype=torch.uint8), is_resident=True)


def test_views_fill_the_buffer_and_share_it():
    page = page_of(512, 1536)
    views = page.views(FIELDS)
    assert {name: view.numel() for name, view in views.items()} == {"code": 1024, "scale": 4}
    views["code"].fill_(255)
    views["scale"].view(torch.uint8).fill_(255)
    assert page.buffer.min() == 255


def test_a_part_is_counted_by_parameters_and_stays_within_the_page():
    page = page_of(512, 1536)
    page.views(FIELDS)["scale"].copy_(torch.arange(4.0))
    assert page.part(FIELDS, 768, 1280)["scale"].tolist() == [1, 2]
    assert page.part(FIELDS, 0, 1024)["scale"].tolist() == [0, 1]
    assert page.part(FIELDS, 1280, 9999)["code"].numel() == 256
