"""fastmem membership: its numbers from end to end, what it prints and writes, its errors."""

import json
import math
import shutil
import zlib
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow.parquet
import pytest
import torch
from cases.score_cases import BOS, byte_tokenizer, llama_folder, small_llama, token_ids
from numpy.typing import NDArray

import fastmem
from fastmem.cli.main import main
from fastmem.memorization import blind_baselines
from fastmem.report import membership_page
from fastmem.training.group import Group

LIRA = ["lira_offline", "lira_offline_example", "lira_online", "lira_online_example"]
TRAIN = ["--width", 16, "--vocab", 64, "--length", 16, "--count", 60, "--steps", 250]


def run(*arguments: object) -> int:
    with pytest.raises(SystemExit) as stop:
        main([str(argument) for argument in arguments])
    return int(stop.value.code or 0)


def result_of(folder: Path) -> dict[str, Any]:
    return dict(json.loads((folder / "membership.json").read_bytes()))


def columns_of(folder: Path) -> dict[str, NDArray[Any]]:
    table = pyarrow.parquet.read_table(folder / "membership.parquet")
    return {name: table[name].to_numpy() for name in table.column_names}


@pytest.fixture(scope="module")
def ours(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("models") / "ours"
    assert run("train", *TRAIN, "--out", folder) == 0
    return folder


@pytest.fixture(scope="module")
def llama(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return llama_folder(tmp_path_factory.mktemp("models") / "llama")


@pytest.fixture(scope="module")
def reference(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("models") / "reference"
    small_llama(seed=1).save_pretrained(folder)
    byte_tokenizer().save_pretrained(folder)
    return folder


@pytest.fixture(autouse=True)
def quick(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> None:
    """Fewer trees in the blind baselines, and a page without figures where no test reads them."""
    monkeypatch.setattr(blind_baselines, "TREES", 10)
    if request.node.name != "test_far_below_capacity":
        monkeypatch.setattr(membership_page, "pictures", lambda *arguments: ["<svg></svg>"])


def write_lines(path: Path, texts: list[str]) -> Path:
    path.write_text("".join(json.dumps({"text": text}) + "\n" for text in texts))
    return path


@pytest.fixture
def sides(tmp_path: Path) -> list[object]:
    """Flags of two files of texts of unequal lengths."""
    generator = np.random.default_rng(0)
    words = ["sun", "moon", "a", "tea", "it", "is"]
    texts = [" ".join(generator.choice(words, 2 + i % 5)) + f" {i}" for i in range(40)]
    members = write_lines(tmp_path / "members.jsonl", texts[:20])
    others = write_lines(tmp_path / "others.jsonl", texts[20:])
    return ["--members", members, "--non-members", others]


def test_far_below_capacity(ours: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """Fails if a model that memorized its data does not tell them from held-out sequences, a number
    printed is not the one in membership.json, or the table is wider than 80 columns."""
    out = tmp_path / "out"
    assert run("membership", ours, "--out", out) == 0
    printed = capsys.readouterr().out
    found = result_of(out)
    assert (found["members"], found["non_members"], found["warning"]) == (60, 60, None)
    assert found["scores"].keys() == {"loss", "zlib", "min_k", "max_k", "surp", "min_k_plus_plus"}
    assert set(found["blind"]) == {"bag_of_words", "date_length"}
    loss = found["scores"]["loss"]
    assert loss["auc"]["estimate"] >= 0.999
    assert set(loss["f1"]) == {"calibrated", "median", "always"}
    assert loss["f1"]["median"]["estimate"] == 1
    assert loss["tpr"]["0.001"]["estimate"] is None
    assert "cannot be told: 0.1 % of 60 non-members is less than one sequence" in printed
    assert f"{loss['auc']['estimate']:.3f} [{loss['auc']['low']:.3f}" in printed
    assert found["expected"]["auc"] > 0.999
    assert max(map(len, printed.splitlines()[:12])) <= 80
    table = columns_of(out)
    assert list(table) == ["sequence", "is_member", *found["scores"]]
    assert table["is_member"].tolist() == [True] * 60 + [False] * 60
    members, others = table["loss"][:60], table["loss"][60:]
    assert loss["auc"]["estimate"] == (members[:, None] > others).mean()
    page = (out / "membership.html").read_text()
    (out / "membership.html").unlink()
    assert run("report", out) == 0
    assert (out / "membership.html").read_text() == page


def test_untrained_is_at_chance(tmp_path: Path) -> None:
    """Fails if a model that was never trained tells members from non-members, or classes of unequal
    sizes are not told."""
    fastmem.GPT(fastmem.GPTConfig(1, 16, 4, vocab=64, length=16)).to_hf(tmp_path / "model")
    tokens = fastmem.UniformSequences(150, 16, 64).tokens(slice(None))
    np.save(tmp_path / "a.npy", tokens[:100])
    np.save(tmp_path / "b.npy", tokens[100:])
    sides = ["--members", tmp_path / "a.npy", "--non-members", tmp_path / "b.npy"]
    assert run("membership", tmp_path / "model", *sides, "--out", tmp_path / "out") == 0
    found = result_of(tmp_path / "out")
    for one in found["scores"].values():
        assert one["auc"]["low"] < 0.5 < one["auc"]["high"]
        assert one["balanced"] == "50 members and 50 non-members, a random 50 of 100 members"
    assert found["expected"] is None


def statistics64(model: Any, tokens: list[int]) -> tuple[NDArray[Any], NDArray[Any], NDArray[Any]]:
    """Bits, entropy and variance of each token after the first, by float64 logits."""
    with torch.no_grad():
        logits = model.double()(torch.tensor([tokens[:-1]])).logits[0]
    log_p = torch.log_softmax(logits, -1).numpy()
    all_bits, p = -log_p / math.log(2), np.exp(log_p)
    entropy = (p * all_bits).sum(1)
    variance = (p * (all_bits - entropy[:, None]) ** 2).sum(1)
    return all_bits[np.arange(len(tokens) - 1), tokens[1:]], entropy, variance


def test_scores_equal_float64_logits(
    llama: Path, reference: Path, sides: list[object], tmp_path: Path
) -> None:
    """Fails if a score of texts of unequal lengths is not, to 1e-3, its formula on float64 logits,
    one text at a time; such as for a pass without BOS, or with a padded token."""
    out = tmp_path / "out"
    flags = ["--reference", reference, "--k", 20, "--batch-tokens", 100]
    assert run("membership", llama, *sides, *flags, "--out", out) == 0
    found = columns_of(out)
    texts = [
        json.loads(line)["text"]
        for side in (sides[1], sides[3])
        for line in Path(str(side)).read_text().splitlines()
    ]
    models = [small_llama(seed) for seed in (0, 1)]
    for i, text in enumerate(texts):
        tokens = [BOS, *token_ids(text)]
        b, h, v = statistics64(models[0], tokens)
        r, _, _ = statistics64(models[1], tokens)
        m = max(1, int(0.2 * len(b)))
        surprising = np.sort(b)[-m]
        certain = (b >= surprising) & (h < 2 / math.log(2))
        votes = []
        for step in range(10):
            w = min(len(b), round(2 * 20 ** (step / 9)))
            gains = [r[j : j + w].sum() > b[j : j + w].sum() for j in range(len(b) - w + 1)]
            votes.append(np.mean(gains))
        exact = {
            "loss": -b.mean(),
            "zlib": -b.mean() / len(zlib.compress(text.encode())),
            "min_k": -np.sort(b)[-m:].mean(),
            "max_k": -np.sort(b)[:m].mean(),
            "surp": -b[certain].mean() if certain.any() else -np.sort(b)[-m:].mean(),
            "min_k_plus_plus": np.sort((h - b) / np.sqrt(v))[:m].mean(),
            "reference": r.mean() - b.mean(),
            "reference_ratio": -b.mean() / r.mean(),
            "window_votes": np.mean(votes),
        }
        assert exact.keys() == found.keys() - {"sequence", "is_member"}
        for name, value in exact.items():
            assert found[name][i] == pytest.approx(value, abs=1e-3), (name, text)


def test_shadows_equal_a_plain_implementation(ours: Path, tmp_path: Path) -> None:
    """Fails if LiRA or RMIA on 8 shadow models differ from loops over the published formulas, or a
    shadow model is not what training alone on its half gives."""
    out = tmp_path / "out"
    assert run("membership", ours, "--shadows", 8, "--out", out) == 0
    found, n = columns_of(out), 120
    pool = fastmem.UniformSequences(n, 16, 64).tokens(slice(None))
    halves = []
    for e in range(8):
        order = fastmem.permutation(0, e // 2, n)
        halves.append(sorted(order[: n // 2] if e % 2 == 0 else order[n // 2 :]))
    inside = np.array([[i in set(half) for i in range(n)] for half in halves])
    bits = []
    for e in range(8):
        raw = (out / "shadows" / f"{e:03d}.bits").read_bytes()[:-32]
        bits.append(np.frombuffer(raw) / 15)
    alone = fastmem.GPT(fastmem.GPTConfig(1, 16, 8, vocab=64, length=16), seed=4)
    config = fastmem.TrainConfig(steps=250, seed=4)
    fastmem.train(alone, fastmem.from_array(pool[halves[3]], 64), config, progress=False)
    # Rounding differs by the group and by threads, and 250 steps let it grow.
    again = fastmem.sequence_bits(alone, pool) / 15
    assert again[inside[3]] == pytest.approx(bits[3][inside[3]], abs=0.05)
    assert again[~inside[3]] == pytest.approx(bits[3][~inside[3]], rel=0.3)
    assert bits[3][inside[3]].max() < 0.1 * bits[3][~inside[3]].min()
    x, scores = found["loss"], {name: np.zeros(n) for name in LIRA}
    ins = [[-bits[e][i] for e in range(8) if inside[e, i]] for i in range(n)]
    outs = [[-bits[e][i] for e in range(8) if not inside[e, i]] for i in range(n)]
    assert {(len(a), len(b)) for a, b in zip(ins, outs, strict=True)} == {(4, 4)}
    fixed_in, fixed_out = (
        math.sqrt(np.mean([np.var(one) for one in side])) for side in (ins, outs)
    )
    ratio, offline = np.zeros(n), np.zeros(n)
    for i in range(n):
        for end, s_in, s_out in (
            ("", fixed_in, fixed_out),
            ("_example", np.std(ins[i]), np.std(outs[i])),
        ):
            z_in, z_out = (x[i] - np.mean(ins[i])) / s_in, (x[i] - np.mean(outs[i])) / s_out
            scores[f"lira_offline{end}"][i] = z_out
            log_in, log_out = -(z_in**2) / 2 - math.log(s_in), -(z_out**2) / 2 - math.log(s_out)
            scores[f"lira_online{end}"][i] = log_in - log_out
        p_in, p_out = np.mean(np.exp2(ins[i])), np.mean(np.exp2(outs[i]))
        ratio[i] = 2 ** x[i] / ((p_in + p_out) / 2)
        offline[i] = 2 ** x[i] / ((1.3 * p_out + 0.7) / 2)
    scores["rmia"] = np.array([(ratio[i] >= ratio).mean() for i in range(n)])
    scores["rmia_offline"] = np.array([(offline[i] >= offline).mean() for i in range(n)])
    for name, values in scores.items():
        assert found[name] == pytest.approx(values, rel=1e-6, abs=1e-9), name
    result = result_of(out)
    assert result["shadows"] == {"models": 8, "sequences": 60, "steps": 250}
    assert result["scores"]["lira_online"]["auc"]["estimate"] > 0.999


def test_references(llama: Path, reference: Path, sides: list[object], tmp_path: Path) -> None:
    """Fails if LiRA or RMIA of existing models are not those of their mean bits, or an online form
    is given, which needs models that were trained on the sequences."""
    third = tmp_path / "third"
    small_llama(seed=2).save_pretrained(third)
    byte_tokenizer().save_pretrained(third)
    out = tmp_path / "out"
    assert run("membership", llama, *sides, "--references", reference, third, "--out", out) == 0
    found, result = columns_of(out), result_of(out)
    names = {"lira_offline", "lira_offline_example", "rmia"}
    assert names <= found.keys()
    assert not {"lira_online", "rmia_offline", "reference"} & found.keys()
    assert any("lira_online needs models" in note for note in result["notes"])
    bits = []
    for folder in (out / "target", out / "references" / "0", out / "references" / "1"):
        documents = pyarrow.parquet.read_table(folder / "documents.parquet").to_pydict()
        bits.append(np.divide(documents["bits"], documents["coded_tokens"]))
    mean, spread = np.mean(bits[1:], 0), np.std(bits[1:], 0)
    assert found["lira_offline_example"] == pytest.approx((mean - bits[0]) / spread)
    p = 2.0 ** -bits[0] / (1.3 * (2.0 ** -bits[1] + 2.0 ** -bits[2]) / 2 + 0.7)
    assert found["rmia"] == pytest.approx((p[:, None] >= p).mean(1))


def test_a_stopped_study_goes_on(
    ours: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """Fails if a study that was stopped while its shadow models train ends with other bytes than an
    undisturbed study, or begins again; or a finished study scores or trains again."""
    whole, stopped = tmp_path / "whole", tmp_path / "stopped"
    flags = ["membership", ours, "--shadows", 4, "--json"]
    assert run(*flags, "--out", whole) == 0
    monkeypatch.setattr("fastmem.training.group.CHECKPOINT_SECONDS", 0.0)
    step, taken = Group.step, 0

    def stop_at(group: Group, bar: Any) -> None:
        nonlocal taken
        taken += 1
        if taken == 100:
            raise KeyboardInterrupt
        step(group, bar)

    monkeypatch.setattr(Group, "step", stop_at)
    assert run(*flags, "--out", stopped) == 130
    assert not (stopped / "membership.json").exists()
    assert run(*flags, "--out", stopped) == 0
    assert taken == 100 + 151
    for name in ("membership.parquet", "cases.json"):
        assert (stopped / name).read_bytes() == (whole / name).read_bytes()
    assert {**result_of(stopped), "command": 0} == {**result_of(whole), "command": 0}
    capsys.readouterr()
    target = (whole / "target" / "summary.json").stat().st_mtime_ns
    assert run(*flags, "--out", whole) == 0
    assert taken == 100 + 151
    assert (whole / "target" / "summary.json").stat().st_mtime_ns == target
    assert json.loads(capsys.readouterr().out) == result_of(whole)


def test_the_command_of_the_page_parses(
    llama: Path, reference: Path, sides: list[object], tmp_path: Path
) -> None:
    """Fails if the command on the page makes another study."""
    out = tmp_path / "a folder"
    flags = ["--reference", reference, "--no-text", "--k", 20, 40, "--bos", "always"]
    assert run("membership", llama, *sides, *flags, "--out", out) == 0
    before = {path.name: path.read_bytes() for path in out.iterdir() if path.is_file()}
    _, *words = result_of(out)["command"]
    shutil.rmtree(out / "target")
    assert run(*words) == 0
    assert {path.name: path.read_bytes() for path in out.iterdir() if path.is_file()} == before
    assert {"min_k_20", "min_k_40"} <= columns_of(out).keys()


def test_separable_texts_are_warned_of(
    llama: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """Fails if texts that differ by date give no warning, or the page does not mark each score, or
    shows their text against --no-text."""
    old = write_lines(tmp_path / "a.jsonl", [f"in {1900 + i} a <b>war</b>" for i in range(30)])
    new = write_lines(tmp_path / "b.jsonl", [f"in {2001 + i % 20} app {i}" for i in range(30)])
    out = tmp_path / "out"
    flags = ["--members", old, "--non-members", new, "--out", out]
    assert run("membership", llama, *flags) == 0
    warning = "members and non-members differ without any model"
    assert f"warning: {warning}" in capsys.readouterr().out
    assert result_of(out)["warning"].startswith(warning)
    page = (out / "membership.html").read_text()
    assert page.count('class="warned"') == len(result_of(out)["scores"])
    assert "&lt;b&gt;war&lt;/b&gt;" in page
    assert "<b>" not in page
    assert run("report", out, "--no-text") == 0
    assert "war" not in (out / "membership.html").read_text().replace("warn", "")


def test_k_below_a_token(llama: Path, sides: list[object], tmp_path: Path) -> None:
    """Fails if k % of a sequence is less than one token, and the study does not say so."""
    assert run("membership", llama, *sides, "--k", 1, "--out", tmp_path / "out") == 0
    (note,) = result_of(tmp_path / "out")["notes"]
    assert note.startswith("1 % of the tokens of 40 of 40 sequences is less than one token")


def refused(capsys: pytest.CaptureFixture[str], *arguments: object) -> str:
    """The one line of a refused command."""
    capsys.readouterr()
    assert run("membership", *arguments) == 2
    line = capsys.readouterr().err.splitlines()[-1]
    assert line.startswith("fastmem: ")
    return line.removeprefix("fastmem: ")


def test_overlap(llama: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """Fails if documents on both sides are not counted and named, or --allow-overlap refuses."""
    texts = [f"text {i}" for i in range(25)]
    a, b = (
        write_lines(tmp_path / "a.jsonl", texts),
        write_lines(tmp_path / "b.jsonl", texts[20:] * 5),
    )
    flags = [llama, "--members", a, "--non-members", b, "--out", tmp_path / "out"]
    line = refused(capsys, *flags)
    assert line.startswith(
        "25 of 25 non-members are members too (non-members/b.jsonl:1 is members/"
    )
    assert "non-members/b.jsonl:2 is members/a.jsonl:22, " in line
    assert line.endswith("and 22 more): leave them out, or give --allow-overlap")
    assert not (tmp_path / "out").exists()
    assert run("membership", *flags, "--allow-overlap") == 0
    assert "25 non-members are members too" in result_of(tmp_path / "out")["notes"][0]


def test_too_few(llama: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """Fails if 19 members are taken."""
    a = write_lines(tmp_path / "a.jsonl", [f"a{i}" for i in range(19)])
    b = write_lines(tmp_path / "b.jsonl", [f"b{i}" for i in range(30)])
    line = refused(capsys, llama, "--members", a, "--non-members", b, "--out", tmp_path / "out")
    assert line.startswith("19 members and 30 non-members: give at least 20 of each")


def test_other_tokenizer(
    llama: Path, sides: list[object], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """Fails if a reference whose tokens differ is scored, or compared with other tokens."""
    other = tmp_path / "other"
    shutil.copytree(llama, other)
    byte_tokenizer(bos=False, adds=False).save_pretrained(other)
    out = tmp_path / "out"
    line = refused(capsys, llama, *sides, "--reference", other, "--out", out)
    assert line.startswith(f"the reference {other} has another tokenizer than the model (members/m")
    assert not (out / "reference").exists()
    line = refused(capsys, llama, *sides, "--reference", "./none", "--out", out)
    assert line.startswith("none does not exist: give a folder")


def test_not_finite(
    sides: list[object], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """Fails if bits of one sequence that are not finite are taken, or the sequence is not named."""
    model = small_llama()
    letter = token_ids("q")[0]
    with torch.no_grad():
        model.model.embed_tokens.weight[letter] = torch.inf
    model.save_pretrained(tmp_path / "model")
    byte_tokenizer().save_pretrained(tmp_path / "model")
    path = Path(str(sides[3]))
    path.write_text(path.read_text() + '{"text": "a quiet sea"}\n')
    line = refused(capsys, tmp_path / "model", *sides, "--out", tmp_path / "out")
    assert line.startswith(
        "non-members/others.jsonl:21: the bits of the token at position 0 are not finite"
    )


def test_shadows_that_do_not_fit(
    ours: Path, llama: Path, sides: list[object], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """Fails if shadow models of another data set are used, or are trained for a model that fastmem
    did not train, on texts, or in an odd number."""
    out = tmp_path / "out"
    assert run("membership", ours, "--shadows", 2, "--out", out) == 0
    assert run("membership", ours, "--out", out) == 0
    assert f"{out}/shadows has shadow models, which are left out" in capsys.readouterr().err
    line = refused(capsys, ours, "--shadows", 2, "--seed", 1, "--out", out)
    assert line.startswith(f"{out}/shadows holds shadow models of other halves (seed 0): give")
    settings = out / "shadows" / "shadows.json"
    settings.write_text(settings.read_text().replace("xxh3", "xxh4"))
    assert "was altered" in refused(capsys, ours, "--shadows", 2, "--out", out)
    other = tmp_path / "other"
    shutil.copytree(ours, other)
    data = fastmem.UniformSequences(120, 16, 64, seed=5).tokens(slice(None))
    np.save(tmp_path / "a.npy", data[:60])
    np.save(tmp_path / "b.npy", data[60:])
    files = ["--members", tmp_path / "a.npy", "--non-members", tmp_path / "b.npy"]
    assert run("membership", ours, *files, "--shadows", 2, "--out", tmp_path / "second") == 0
    shutil.rmtree(out / "shadows")
    shutil.copytree(tmp_path / "second" / "shadows", out / "shadows")
    line = refused(capsys, ours, "--shadows", 2, "--out", out)
    assert line.startswith(f"{out}/shadows holds shadow models of other data: give another --out")
    line = refused(capsys, ours, "--shadows", 3, "--out", out)
    assert line.startswith("3 shadow models: give an even number")
    line = refused(capsys, llama, *sides, "--shadows", 4, "--out", tmp_path / "third")
    assert "is not a folder of fastmem train" in line


def test_flags_that_contradict(
    ours: Path, llama: Path, sides: list[object], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """Fails if flags that do not fit each other, or a foreign folder, are taken."""
    out = tmp_path / "out"
    for flags, start in (
        ([llama], f"{llama} has no run.json that records the members: give --members"),
        ([llama, *sides[:2]], "members need non-members: give --members and --non-members"),
        ([llama, *sides, "--references", ours], f"--references {ours} is a single model"),
        ([ours, "--references", ours, llama, "--shadows", 2], "--references and --shadows 2 give"),
        ([llama, *sides, "--k", 0], "--k must be percentages above 0 up to 100"),
        ([llama, *sides, "--seed", -1], "--seed must be from 0 to"),
        ([ours, "--shadows", 3], "3 shadow models: give an even number"),
    ):
        assert refused(capsys, *flags, "--out", out).startswith(start)
        assert not out.exists()  # refused before a model scores
    (tmp_path / "notes").mkdir()
    (tmp_path / "notes" / "mine.txt").write_text("x")
    line = refused(capsys, ours, "--out", tmp_path / "notes")
    assert line.startswith(f"{tmp_path / 'notes'} is not the folder of a study of membership")


def test_empty_document(llama: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """Fails if a document without a token that has bits gets a score."""
    a = write_lines(tmp_path / "a.jsonl", [*(f"a{i}" for i in range(25)), ""])
    b = write_lines(tmp_path / "b.jsonl", [f"b{i}" for i in range(25)])
    line = refused(capsys, llama, "--members", a, "--non-members", b, "--out", tmp_path / "out")
    assert line.startswith(
        "members/a.jsonl:26 has no token with bits (1 of 51 documents): leave it out"
    )
