"""Writes what a fuzzer begins with, for each format: small files of the tests, and what is made here.

Usage: seeds.py <folder>      the folder has one for each format
"""

import fractions
import io
import json
import pathlib
import pickle
import re
import struct
import sys
import types
import zipfile

OUT = pathlib.Path(sys.argv[1])
ROOT = pathlib.Path(__file__).resolve().parents[2]
sys.path.insert(0, str(ROOT / "tests/tools"))
MOST = 4096  # bytes, as fuzz.sh has it


def put(kind, name, content):
    path = OUT / kind / name
    if len(content) <= MOST and not path.exists():
        path.write_bytes(content)


def weights():
    for path in sorted((ROOT / "tests/weights/files").iterdir()):
        if path.suffix == ".safetensors":
            put("safetensors", path.name, path.read_bytes())
        elif path.name == "legacy.pt":
            put("legacy", path.name, path.read_bytes())
        else:
            put("zip", path.name, path.read_bytes())
            archive = zipfile.ZipFile(path)
            data = next(name for name in archive.namelist() if name.endswith("data.pkl"))
            put("pickle", path.name, archive.read(data))


def demucs():
    """A checkpoint of demucs without weights, whose class need not be installed."""
    module = sys.modules["demucs.htdemucs"] = types.ModuleType("demucs.htdemucs")
    sys.modules["demucs"] = types.ModuleType("demucs")
    module.HTDemucs = type("HTDemucs", (), {"__module__": "demucs.htdemucs"})
    arguments = {"audio_channels": 2, "samplerate": 44100, "segment": fractions.Fraction(39, 5), "channels": 4,
                 "cac": True,
                 "channels_time": None, "multi_freqs": [], "t_emb": "sin", "t_sin_random_shift": 0, "t_heads": 2}
    for name, args, kwargs in [("args.th", (["drums", "bass"],), arguments), ("kwargs.th", (), {"sources": ["a"]})]:
        file = io.BytesIO()
        with zipfile.ZipFile(file, "w") as archive:
            package = {"klass": module.HTDemucs, "args": args, "kwargs": kwargs, "state": {}}
            archive.writestr("x/data.pkl", pickle.dumps(package, 2))
        put("demucs", name, file.getvalue())


def configurations():
    from sample_track import CONFIG

    for path in sorted((ROOT / "examples/configs").glob("*.json")):
        put("json", path.name, path.read_bytes())
        put("configuration", path.name, path.read_bytes())
    for path in sorted((ROOT / "tests/tools/published").glob("*.yaml")):
        put("yaml", path.name, path.read_bytes())
        put("configuration", path.name, path.read_bytes())
    put("configuration", "tiny.json", json.dumps(CONFIG).encode())
    for kind in ["htdemucs", "bs_roformer", "mel_band_roformer"]:
        put("configuration", kind + ".json", json.dumps({"model": {"type": kind}}).encode())
    sources = "".join(path.read_text() for path in sorted((ROOT / "include").rglob("*.hpp")))
    keys = sorted(set(re.findall(r'field\("(\w+)"', sources)))
    (OUT / "configuration.dict").write_text("".join(f'"\\"{key}\\":"\n' for key in keys))
    profile = {"name": "a", "type": "cuda", "total_bytes": 2**30, "context_bytes": 1, "workspace_bytes": 5,
               "flops_per_second": 1e12, "caching_allocator": True, "expandable_segments": False}
    known = ["total_bytes", "context_bytes", "workspace_bytes", "flops_per_second"]
    profile.update({f"{key}_source": "x" for key in known})
    put("profile", "whole.json", json.dumps(profile).encode())


def audio():
    """The beginnings of the kinds whose length is read, and a WAV file that is whole."""
    chunks = b"fmt " + struct.pack("<IHHIIHH", 16, 1, 2, 44100, 176400, 4, 16)
    chunks += b"data" + struct.pack("<I", 8) + b"\1" * 8
    whole = {
        "wav": b"RIFF" + struct.pack("<I", 4 + len(chunks)) + b"WAVE" + chunks,
        "rf64": b"RF64\xff\xff\xff\xffWAVEds64" + struct.pack("<IQQQI", 28, 80, 8, 2, 0) + chunks,
        "aiff": b"FORM" + struct.pack(">I", 46) + b"AIFFCOMM" + struct.pack(">IHIH", 18, 1, 2, 16)
                + b"\x40\x0e\xac\x44" + bytes(6) + b"SSND" + struct.pack(">III", 12, 0, 0) + b"\1" * 4,
        "au": b".snd" + struct.pack(">IIIII", 24, 8, 3, 44100, 2) + b"\1" * 8,
        "caf": b"caff\0\1\0\0desc" + struct.pack(">QdIIIIII", 32, 44100, 0x6C70636D, 0, 4, 1, 2, 16)
               + b"data" + struct.pack(">QI", 12, 0) + b"\1" * 8,
        "w64": b"riff\x2e\x91\xcf\x11\xa5\xd6\x28\xdb\x04\xc1\0\0" + struct.pack("<Q", 80) + bytes(56),
        "flac": b"fLaC\0\0\0\x22" + bytes([16, 0, 16, 0]) + bytes(6) +
                bytes([0x0A, 0xC4, 0x42, 0xF0, 0, 0, 16, 0]) + bytes(16)
                + bytes([0xFF, 0xF8, 0xC9, 0x18, 0, 0xC2]),
        "ogg": b"OggS\0\6" + bytes(8) + bytes(12) + b"\1\4abcd",
        "mp3": b"ID3\4" + bytes(6) + b"\xff\xfb\x90\x64" + bytes(32) + b"Xing" +
               struct.pack(">III", 3, 1, 80) + bytes(40),
    }
    for name, content in whole.items():
        put("container", name, content)
        put("audio", name, content)


def words():
    for reader, examples in enumerate([["8x3s", "8x132300"],
                                       ["segment_length=3s..15s:7", "batch_size=1,2,4", "model.n_layers=4..12:3"],
                                       ["6*full,none", "selective+every-2", "full+nested-3+bf16", "tiled+offload"],
                                       ["24GiB", "500 MB", "1000000"], ["{track}/{stem}.{ext}", "{model}"],
                                       ["last-12.pt", "last.pt"], ['a,"b """,c\x1b']]):
        for example in examples:
            put("words", f"{reader}{len(example)}", bytes([reader]) + example.encode())


def others():
    put("table", "table.csv", b'instrum,path\nvocals,a.wav\n"drums","b ""x"",.wav"\nbass,c\n')
    content, checksum = b"archive", 0xCBF29CE484222325
    for byte in content:
        checksum = (checksum ^ byte) * 0x100000001B3 % 2**64
    put("state", "state.pt", content + b"headrm01" + struct.pack("<QQ", len(content), checksum))


for make in [weights, demucs, configurations, audio, words, others]:
    make()
