"""The cache command in several processes, and after a run was killed."""

import io
import re
import time
from contextlib import redirect_stderr, redirect_stdout
from pathlib import Path

import numpy as np
import pytest
from accelerate import Accelerator
from process_group import run_processes, start_processes
from test_latents import (
    assert_encoded,
    build_autoencoder,
    build_codec,
    cache_folders,
    config,
    open_images,
    read,
    write_images,
)

from transfusion_mot.codecs.load import load_codec
from transfusion_mot.config import CodecConfig
from transfusion_mot.data.cache import main
from transfusion_mot.data.encoded_media import encoded_media
from transfusion_mot.data.images import to_pixels
from transfusion_mot.errors import UserError

pytestmark = pytest.mark.slow


def command_in_a_group(arguments: list[str]) -> tuple[str, str]:
    """What it prints."""
    with redirect_stdout(io.StringIO()) as output, redirect_stderr(io.StringIO()) as errors:
        main(arguments)
    return output.getvalue(), errors.getvalue()


@pytest.mark.parametrize("kind", ["latents", "codes"])
def test_the_command_encodes_both_splits_with_two_processes_and_once(tmp_path, capsys, kind):
    folder = tmp_path / "images"
    write_images(folder, [(16, 16)] * 7)
    codec = build_codec(kind)
    (codec.vae if kind == "latents" else codec.model).save_pretrained(folder.parent / "vae")
    objective = "diffusion" if kind == "latents" else "next_token"
    (folder / "4.png").write_bytes(b"no picture")
    arguments = [
        *(f"data.sources=[{{kind: imagefolder, path: {folder}}}]", f"data.cache_dir={folder.parent / 'cache'}"),
        *(f"codecs.image.path={folder.parent / 'vae'}", "data.image_size=16", "data.held_out_fraction=0.3"),
        *("data.num_workers=1", "data.latents=prepared", f"model.modalities.image.objective={objective}"),
        "data.slots.image=65",
    ]
    (output, errors), _ = run_processes(command_in_a_group, 2, {}, tmp_path / "group", arguments)
    assert "process 1 of 2" in errors
    assert re.search(r"\(train\): (\d) images, \1 of them new; skipped: .*MB in ", output)
    assert "(held_out)" in output
    assert output.count("1 unreadable image") == 1
    assert re.search(r"encoded 6 images in [\d.]+ s: [\d.]+ images/s", output)
    assert len(cache_folders(folder)) == 1

    data = config(folder, held_out_fraction=0.3, latents="prepared")
    codec = load_codec(CodecConfig(str(folder.parent / "vae")), objective, "cpu")
    cache = encoded_media(open_images(folder, data), codec, data, batch_size=4)
    for index in np.flatnonzero(cache.readable):
        assert_encoded(cache, index, to_pixels(cache.media.image(index)), codec)
    main(arguments)
    output = capsys.readouterr().out
    assert "0 of them new" in output
    assert "encoded" not in output


@pytest.mark.parametrize(
    ("setting", "message"),
    [
        ("data.image_size=18", "image_size is 18; it must be a multiple of 4"),
        ("data.buckets=[[16, 16], [16, 18]]", "is 18; it must be a multiple of 4"),
        ("data.cache_dir={file}", "cannot make the folder data.cache_dir, '.*metadata.jsonl'"),
        ("data.cache_dir={file}/below", "cannot make the folder data.cache_dir, '.*below'"),
    ],
)
def test_the_command_refuses_before_the_work(tmp_path, setting, message):
    folder = tmp_path / "images"
    write_images(folder, [(16, 16)] * 3)
    build_autoencoder().vae.save_pretrained(tmp_path / "vae")
    arguments = [
        *(f"data.sources=[{{kind: imagefolder, path: {folder}}}]", f"data.cache_dir={tmp_path / 'cache'}"),
        *(f"codecs.image.path={tmp_path / 'vae'}", "data.image_size=16", "data.num_workers=0"),
    ]
    with pytest.raises(UserError, match=message):
        main([*arguments, setting.format(file=folder / "metadata.jsonl")])
    assert not (tmp_path / "cache").exists()


def test_help_keeps_its_lines(capsys):
    with pytest.raises(SystemExit):
        main(["--help"])
    assert (
        "\n    accelerate launch -m transfusion_mot.data.cache --config configs/emoji_small.yaml\n"
        in capsys.readouterr().out
    )


def encode_in_a_group(folder: Path) -> int:
    """How many images this rank has encoded."""
    data, accelerator = config(folder), Accelerator(cpu=True)
    return encoded_media(
        open_images(folder, data),
        build_autoencoder(),
        data,
        batch_size=2,
        accelerator=accelerator,
        shard_media=3,
    ).num_encoded


def test_ranks_share_the_shards_and_go_on_where_a_killed_run_was(tmp_path):
    """Killed as soon as there is a shard."""
    folder = tmp_path / "images"
    write_images(folder, [(16, 16)] * 40)
    processes = start_processes(encode_in_a_group, 2, {}, tmp_path / "killed", folder)
    while not list(tmp_path.glob("cache/latent-cache-*/*x*/*.safetensors")):
        assert all(process.is_alive() for process in processes)
        time.sleep(0.002)
    for process in processes:
        process.kill()
        process.join()
    (unfinished,) = cache_folders(folder)
    assert not list(unfinished.glob("index-*"))
    finished = len([*unfinished.glob("*x*/*.safetensors")])
    encoded = run_processes(encode_in_a_group, 2, {}, tmp_path / "group", folder)
    whole = encoded_media(
        open_images(folder, config(folder)),
        build_autoencoder(),
        config(folder, cache_dir=str(tmp_path / "other")),
        batch_size=2,
        shard_media=3,
    )
    assert encoded[0] == encoded[1], "of both together"
    assert 0 < encoded[0] <= 40 - 3 * finished + 2
    cache = encoded_media(open_images(folder, config(folder)), build_autoencoder(), config(folder), batch_size=2)
    assert cache.num_encoded == 0
    for index in range(40):
        np.testing.assert_allclose(read(cache, index), read(whole, index), atol=1e-3)
