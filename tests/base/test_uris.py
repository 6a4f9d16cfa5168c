"""What becomes of keys in URIs: nothing that is stored or printed has them."""

from __future__ import annotations

import pickle

import pytest

from vitq_ray.base.config import InputError
from vitq_ray.base.files import one_line
from vitq_ray.base.uris import without_keys


@pytest.mark.parametrize(
    ("text", "shown"),
    [
        ("s3://AKIA:se%2Fcret@bucket/data", "s3://bucket/data"),
        ("s3://AKIA:se/c+ret=@bucket/im@2012/val.zip", "s3://bucket/im@2012/val.zip"),
        ("s3://k:s@cret@bucket/x", "s3://bucket/x"),
        ("s3://:secret@bucket", "s3://bucket"),
        ("S3://k:secret@bucket", "S3://bucket"),
        ("s3://bucket/im@2012/x", "s3://bucket/im@2012/x"),
        ("s3://host:9000/bucket@x/y", "s3://host:9000/bucket@x/y"),
        ("s3://[::1]:9000/b@x", "s3://[::1]:9000/b@x"),
        ("s3://bucket/a:b@c", "s3://bucket/a:b@c"),
        ("gs://anonymous@bucket/x", "gs://anonymous@bucket/x"),
        ("abfss://box:secret@account/x", "abfss://box@account/x"),
        ("s3://b/x?region=us&secret_key=abc&z=1", "s3://b/x?region=us&secret_key=…&z=1"),
        ("https://h/x?X-Amz-Signature=abc", "https://h/x?X-Amz-Signature=…"),
        ("no 's3://k:s@b/x', no s3://k:s@c/y; done", "no 's3://b/x', no s3://c/y; done"),
        ("s3:///k:secret@bucket/x", "s3:///bucket/x"),
        ("s3:/k:secret@bucket/x", "s3:/bucket/x"),
        ("file:///x:y@z/data", "file:///x:y@z/data"),
        ("/data/x:y@z", "/data/x:y@z"),
        ("host:9000/a@b", "host:9000/a@b"),
    ],
)
def test_without_keys(text: str, shown: str) -> None:
    assert without_keys(text) == shown
    assert without_keys(shown) == shown


def test_no_error_has_keys() -> None:
    error = InputError("s3://key:secret@bucket/x: no such file")
    assert str(error) == str(pickle.loads(pickle.dumps(error))) == "s3://bucket/x: no such file"
    assert one_line(OSError("s3://key:secret@bucket/x: timed\nout")) == "s3://bucket/x: timed out"
