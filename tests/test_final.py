"""final_evaluation.py: measurements of models that are known, and tables of small runs that are written here."""

import json
import math
import re
import shutil
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from helpers import CPU, data_of, expect_error, oracle, tiny_model
from scipy.stats import ttest_rel
from test_fid import Colours
from torch.distributions import Categorical, MixtureSameFamily, MultivariateNormal, Normal, kl_divergence

import common
import fid
import final_evaluation as final
import stage1_baseline
import stage2_joint

# ---- Measuring -------------------------------------------------------------------------------------------------------


@pytest.fixture
def here(tmp_path, monkeypatch):
    """What is kept and drawn lies in an empty folder."""
    monkeypatch.chdir(tmp_path)
    return tmp_path


def test_robustness(here):
    """The reference are a VAE's own samples. With nothing spoilt, fd is that of the model. Noise and blur raise that of
    a VAE, and of a refiner that copies what it is shown. A refiner that knows the clean images has one fd."""
    model = tiny_model(prior="gaussian", seed=5, probe_samples=50)
    samples = common.ImageData(stage1_baseline.generate(model, model.settings, torch.randn(300, 8))[1], "")
    scorer = fid.Scorer(fid.load_extractor("local"), common.Data(None, samples, samples))

    def measured():
        rows = final.robustness(here, stage1_baseline, model, model.settings, scorer)
        return {row["label"]: row["fd"] for row in rows}

    copies = measured()
    z = stage1_baseline.draw_codes(model, model.settings, 50)
    own = scorer.fd(stage1_baseline.generate(model, model.settings, z)[1])
    assert copies["nothing"] == pytest.approx(own, rel=1e-6)
    assert own < copies["noise 0.1"] < copies["noise 0.2"] < copies["noise 0.4"] and own < copies["blur 1"]
    assert copies["blur 1"] < copies["blur 2"] and copies["noise 0.5 on z"] != pytest.approx(own, rel=1e-3)
    assert copies["mean over noise"] == pytest.approx(sum(copies[f"noise {sd}"] for sd in (0.1, 0.2, 0.4)) / 3)
    clean = oracle(model.diffusion, model.vae.decoder(z))
    model.unet = lambda shown, t: clean(shown[:, :3], t)
    assert list(measured().values()) == pytest.approx([own] * 8, rel=1e-3)
    model.variant = "vae"
    assert list(measured().values()) == pytest.approx(list(copies.values()), rel=1e-3)


def test_path_over_distance():
    """1 of a straight line. Long paths count for more: lengths are averaged before."""
    line = torch.linspace(0, 1, 9)[None, :, None] * torch.tensor([3.0, 4.0])
    assert final.path_over_distance(line) == pytest.approx(1)
    there_and_back = torch.tensor([[[0.0], [9], [1]], [[0.0], [1], [2]]])  # lengths 17 and 2, ends 1 and 2 apart
    assert final.path_over_distance(there_and_back) == pytest.approx(19 / 3)


def test_ridge_regression():
    """A linear map is recovered, whatever the units, beside a column that is constant. The penalised solution is that
    of least squares with more rows: a root of the penalty for each column, and zeros as targets."""
    gen = common.generator(0, "")
    x = torch.randn(300, 3, generator=gen) * torch.tensor([1e-3, 1, 0]) + 5
    y = x @ torch.tensor([[2e3, 0], [1, -1], [0, 1]])
    weight, bias = final.ridge_regression(x, y, ridge=1e-7)
    torch.testing.assert_close(x @ weight + bias, y, rtol=1e-3, atol=1e-2)
    x = torch.randn(300, 3, generator=gen)
    x = (x - x.mean(0)) / x.std(0)
    y = x[:, :2] + torch.randn(300, 2, generator=gen)
    rows, targets = torch.cat([x, math.sqrt(60) * torch.eye(3)]), torch.cat([y - y.mean(0), torch.zeros(3, 2)])
    torch.testing.assert_close(final.ridge_regression(x, y, ridge=0.2)[0], torch.linalg.lstsq(rows, targets)[0])


def test_latent_space(here, monkeypatch):
    """With planted codes: two of three factors, and the class. Densities and the KL are those of torch.distributions.
    Paths are those of decoded codes, since the refiner copies."""
    scorer = fid.Scorer(Colours(), data_of(200, 60))
    train, test = scorer.data.train, scorer.data.test
    for part in (train, test):
        part.factors = torch.cat([part.factors[:, :2], torch.randn(len(part.images), 1)], 1)

    def encode(encoder, images, device):
        data = train if len(images) > 60 else test
        index = (data.images[None] == images[:, None]).flatten(2).all(2).float().argmax(1)
        mu = torch.cat([data.factors[index, :2], F.one_hot(data.labels[index], 6)], 1)
        return mu, torch.full_like(mu, -2.0)

    monkeypatch.setattr(common, "encode", encode)
    model, seen = tiny_model(sample_steps=1), []
    means, factors = torch.randn(2, 8), torch.randn(2, 8, 8).tril(-1) + torch.eye(8)
    model.priors |= {"gmm": common.GaussianMixture(torch.tensor([0.3, 0.7]), means, factors),
                     "seen": SimpleNamespace(log_prob=lambda z: seen.append(z) or torch.zeros(1),
                                             sample=lambda count, gen: encode(None, train.images, CPU)[0])}
    row, = final.latent_space(here, stage1_baseline, model, model.settings, scorer)
    mu, _ = encode(None, test.images, CPU)
    codes, q = seen[0], Normal(mu, math.exp(-1))
    assert (codes - mu).std().item() == pytest.approx(math.exp(-1), rel=0.15)
    assert row["kl_nats"] == pytest.approx(kl_divergence(q, Normal(0.0, 1.0)).sum(1).mean().item(), rel=1e-5)
    mixture = MixtureSameFamily(Categorical(torch.tensor([0.3, 0.7])), MultivariateNormal(means, scale_tril=factors))
    for name, density in (("gaussian", Normal(0.0, 1.0).log_prob(codes).sum(1)), ("gmm", mixture.log_prob(codes))):
        assert row[f"log_density {name}"] == pytest.approx(density.mean().item(), rel=1e-4)
    of_prior = model.priors["gmm"].sample(60, common.generator(0, "codes"))
    training = encode(None, train.images, CPU)[0]
    new, real = ((x[:, None] - training).norm(dim=2).min(1)[0].mean().item() for x in (of_prior, codes))
    assert row["novelty gmm"] == pytest.approx(new / real, rel=1e-3) and row["novelty seen"] < 0.02
    assert row["probe_accuracy"] == 1 and row["probe_r2"] == pytest.approx(2 / 3, abs=0.1)
    path = [model.vae.decoder(stage2_joint.slerp(mu[:16], mu[16:32], w / 8)) for w in range(9)]
    features = torch.stack([fid.extract(scorer.extractor, common.to_uint8(x))[0] for x in path], 1)
    assert row["path_over_distance"] == pytest.approx(final.path_over_distance(features), rel=1e-2)


def test_times_are_medians_of_runs_in_turn(here, monkeypatch):
    """Of a clock that moves only while images are drawn. The first round does not count. A second measurement takes the
    place of the first; other rows stay."""
    clock, order = [0.0], []

    def load_run(folder, device):
        seconds = iter([1000, 1, 30, 2, 3, 500] * 2 if folder.name == "a" else [7] * 6)

        def generate(model, settings, z):
            order.append(folder.name)
            clock[0] += next(seconds)

        return SimpleNamespace(draw_codes=lambda *_: torch.zeros(10, 8), generate=generate), None, {"eval_batch": 10}

    monkeypatch.setattr(final, "load_run", load_run)
    monkeypatch.setattr(final, "time", SimpleNamespace(time=lambda: clock[0]))
    for name in "ab":
        write_run(here / name, evaluation=[{"label": "nothing", "fd": 2.0}])
    for _ in range(2):
        final.main(["--times", str(here / "a"), str(here / "b"), "--device", "cpu"])
    for name, seconds in (("a", 0.3), ("b", 0.7)):
        assert json.loads((here / name / "evaluation.json").read_text()) == [
            {"label": "nothing", "fd": 2.0}, {"label": "timed", "seconds_per_image": seconds}]
    assert order == ["a", "b"] * 12


def test_measuring_a_finished_run(small):
    """From its checkpoint. With nothing spoilt it has the fd of its headline. Behind `form1`, the latent space is not
    measured of the VAE alone."""
    stage1_baseline.main("--budget smoke --device cpu".split())
    runs = sorted(map(str, Path("runs/shapes-smoke").iterdir()))
    final.main(["--measure", *runs, "--device", "cpu"])
    for run, latent in zip(runs, (True, False), strict=True):
        rows = {row["label"]: row for row in json.loads(Path(run, "evaluation.json").read_text())}
        headline = json.loads(Path(run, "metrics.json").read_text())["rows"][0]
        assert rows["nothing"]["fd"] == pytest.approx(headline["fd"]["value"], rel=1e-6)
        assert len(rows) == 8 + latent and ("" in rows) == latent


# ---- Tables ----------------------------------------------------------------------------------------------------------

@pytest.fixture
def project(tmp_path, monkeypatch):
    """A folder whose results/scores.csv has no lines yet."""
    monkeypatch.setattr(final, "RESULTS", tmp_path / "results")
    (tmp_path / "results").mkdir()
    (tmp_path / "results" / "scores.csv").write_text(",".join(final.COLUMNS) + "\n")
    return tmp_path


def write_run(folder, variant="stage1-form1", seed=0, fd=2.0, evaluation=(), **facts):
    """The folder of a run, with a headline, a row before refinement and one with fewer steps."""
    run = {"dataset": "shapes", "variant": variant, "changes": {}, "budget": "cpu", "seed": seed, "data_note": "drawn",
           "features": "local-shapes", "minutes": 4.0, "parameters": 1234567, "commit": "abc"} | facts
    rows = [{"label": label, "prior": "gmm", "sampler": "dpm", "steps": 10, "n_generated": count,
             "seconds_per_image": 0.02, "fd": {"value": value, "low": 0.9 * value, "high": 1.1 * value},
             "kid": {"value": 1 / 3}}
            for label, value, count in (("", fd, 1000), ("before", 3 * fd, 1000), ("dpm 5", 2 * fd, 300))]
    folder.mkdir(parents=True, exist_ok=True)
    (folder / "metrics.json").write_text(json.dumps({"schema": 1, "run": run, "rows": rows, "training": []}))
    if evaluation:
        (folder / "evaluation.json").write_text(json.dumps(evaluation))
    return folder


def under_noise(fd):
    return [{"label": label, "n_generated": 300, "fd": factor * fd}
            for label, factor in (("nothing", 1.0), ("noise 0.1", 2.0), ("noise 0.4", 4.0), ("mean over noise", 3.0))]


def cells(text, name):
    """{column: cell} of the first line of a table that has `name` as a cell."""
    lines = [[part.strip() for part in line.strip("|").split(" | ")] for line in text.splitlines()]
    row = next(i for i, line in enumerate(lines) if name in line)
    header = next(lines[i - 1] for i in range(row, 0, -1) if set(lines[i]) == {"---"})
    return dict(zip(header, lines[row], strict=True))


def test_lines_of_a_run(tmp_path):
    """One for each measure of each row."""
    rows = [{"label": "", "n_generated": 60, "log_density gmm": -60.5}, {"label": "timed", "seconds_per_image": 0.5}]
    lines = final.read_run(write_run(tmp_path, seed=3, fd=2.5, evaluation=rows,
                                     changes={"beta": 1.0, "start": 9}))
    found = {line["measure"]: line for line in lines}
    values = {"fd": "2.5", "fd, before": "7.5", "fd, dpm 5": "5", "kid": "0.333333", "seconds_per_image, timed": "0.5",
              "log_density gmm": "-60.5", "minutes": "4", "parameters": "1.23457e+06"}
    assert {name: found[name]["value"] for name in values} == values and len(found) == len(lines) == 16
    assert found["fd"] == {
        "dataset": "shapes", "variant": "stage1-form1", "changes": "beta=1.0 start=9", "seed": "3", "measure": "fd",
        "value": "2.5", "low": "2.25", "high": "2.75", "images": "1000", "features": "local-shapes", "commit": "abc",
        "budget": "cpu", "data": "drawn"}


def test_collecting_twice_leaves_one_copy(project):
    """A run that is collected again takes the place of the same run; others, with another seed or changes, stay."""
    folders = [str(write_run(project / name, seed=seed, changes=changes, evaluation=under_noise(2.0)))
               for name, seed, changes in (("a", 0, {}), ("b", 1, {}), ("c", 0, {"beta": 1.0}))]
    final.main(["--collect", *folders, str(project)])
    once = final.read_scores()
    final.main(["--collect", *folders])
    assert final.read_scores() == once and len(once) == 3 * (3 * 4 + 2 + 4)
    write_run(project / "a", fd=9.0)
    (project / "a" / "evaluation.json").unlink()
    final.main(["--collect", folders[0]])
    lines = final.read_scores()
    assert len(lines) == len(once) - 4
    assert [line["value"] for line in lines if line["measure"] == "fd"] == ["9", "2", "2"]


def test_ratios_pair_the_seeds():
    runs = {"a": {"fd": {0: 1.0, 1: 2.0, 2: 3.0, 4: 100.0}}, "b": {"kid": {2: 4.5, 1: 2.5, 0: 2.0, 3: 1000.0}}}
    found, percent = final.ratios(runs, ("a", "fd"), ("b", "kid"))
    assert found.tolist() == pytest.approx([1 / 2, 2 / 2.5, 3 / 4.5]) and percent == pytest.approx(100 * (6 / 9 - 1))
    assert final.ratios(runs, ("a", "fd"), ("c", "fd"))[1] is None


def test_p_values_are_multiplied_by_the_tests_of_their_data_set():
    """Two tests on shapes, one on cifar10, none on three seeds, or where all ratios are the same. Each agrees with
    scipy's test of pairs."""
    random, results = np.random.RandomState(0), {}
    for dataset, seeds in (("shapes", 5), ("cifar10", 4), ("celeba64", 3)):
        results[dataset] = {name: {"fd": dict(enumerate(1.2**i + 0.1 * random.rand(seeds))),
                                   final.NOISY: dict.fromkeys(range(seeds), i + 1.0)}
                            for i, name in enumerate((final.FORM1, final.ANNEAL, final.NO_GRADIENT))}
    del results["cifar10"][final.NO_GRADIENT], results["shapes"][final.NO_GRADIENT][final.NOISY]
    text = final.table_questions(results)
    tested, untested = (cells(text, f"{words}: joint training / stage 1")
                        for words in ("Quality. fd", "Robustness. fd under noise"))
    for dataset, tests in (("shapes", 2), ("cifar10", 1)):
        ours, theirs = (np.array([*results[dataset][name]["fd"].values()]) for name in (final.ANNEAL, final.FORM1))
        p = tests * ttest_rel(np.log(ours), np.log(theirs)).pvalue
        percent = 100 * (ours.mean() / theirs.mean() - 1)
        assert tested[dataset] == f"{percent:+.0f}%, n {len(ours)}, p {p:.2g}"
        assert untested[dataset] == f"+100%, n {len(ours)}"
    assert re.fullmatch(r"\+\d+%, n 3", tested["celeba64"])


def test_order_of_data_sets_variants_and_seeds():
    lines = [{"dataset": dataset, "variant": variant, "changes": "", "seed": seed, "measure": "fd", "value": "1"}
             for dataset in ("photos", "shapes") for seed in ("10", "2")
             for variant in ("bonus-latent", "stage9-new", "stage1-vae")]
    results = final.grouped(lines)
    assert list(results) == ["shapes", "photos"] and list(results["shapes"]["stage1-vae"]["fd"]) == [2, 10]
    assert list(results["shapes"]) == ["stage1-vae", "bonus-latent", "stage9-new"]


def test_tables_and_charts(project):
    """From folders of runs by way of scores.csv: means and deviations over seeds, a row for each commit, no table or
    chart without numbers."""
    for i, (variant, seed, fd, changes, commit) in enumerate((
            (final.FORM1, 0, 2.0, {}, "abc"), (final.FORM1, 1, 3.0, {}, "abc"), (final.ANNEAL, 0, 1.0, {}, "abc"),
            (final.ANNEAL, 1, 1.4, {}, "abc"), (final.ANNEAL, 0, 1.5, {"diffusion_weight": 0.003}, "def"))):
        write_run(project / str(i), variant, seed, fd, under_noise(fd), changes=changes, commit=commit)
    final.main(["--collect", *map(str, project.glob("?"))])
    final.main([])
    text = (project / "results" / "TABLES.md").read_text()
    assert re.findall(r"^## (\w+)", text, re.M) == ["questions", "scores", "losses", "robustness", "steps", "cost",
                                                    "data"]
    scores = cells(text, f"`{final.FORM1}`")
    assert (scores["seeds"], scores["fd"], scores["fd, before"]) == ("2", "2.5±0.71", "7.5±2.1")
    assert [cells(text, commit)["runs"] for commit in ("abc", "def")] == ["4", "1"]
    links = re.findall(r"!\[.*?\]\((.*?)\)", text)
    assert links == [f"figures/{name}.png" for name in ("questions", "cost", "noise", "weights")]
    assert all((project / "results" / link).is_file() for link in links)
    runs = final.grouped(final.read_scores())["shapes"]
    assert final.lines_of_weights(runs) == {
        final.ANNEAL: [([0.003], [1.5]), ([0.03], [1.0, 1.4])], final.NO_GRADIENT: [],
        final.FORM1: [([0.003], [2.0, 3.0]), ([0.03], [2.0, 3.0])]}


def test_new_runs_beside_committed_ones(project):
    """Runs that are measured already are only read."""
    committed = write_run(project / "a", fd=2.0), write_run(project / "b", seed=1, fd=7.0)
    final.main(["--collect", *map(str, committed)])
    write_run(project / "runs" / "a", fd=3.0, evaluation=under_noise(3.0))
    write_run(project / "runs" / "c", final.ANNEAL, fd=2.5, evaluation=under_noise(2.5))
    final.main(["--runs", str(project / "runs")])
    text = (project / "runs" / "REPORT.md").read_text()
    assert cells(text, "`stage1-form1` seed 0")["fd"] == "3 / 2 = 1.50"
    assert cells(text, "`stage2-anneal` seed 0")["fd"] == "2.5" and (project / "runs" / "noise.png").is_file()


def test_tables_of_the_committed_scores(project):
    """They have all variants, and on shapes all comparisons, but no nan."""
    shutil.copy(Path(final.__file__).parent / "results" / "scores.csv", project / "results")
    final.main([])
    text = (project / "results" / "TABLES.md").read_text()
    for question, comparisons in final.QUESTIONS.items():
        for words, _, _ in comparisons:
            assert "n " in cells(text, f"{question.split(':')[0]}. {words}")["shapes"]
    assert "nan" not in text
    variants = {line["variant"] for line in final.read_scores()}
    assert variants <= set(final.VARIANTS) and all(f"`{variant}" in text for variant in variants)


def test_without_runs(project, capsys):
    for flag in ("--measure", "--times", "--collect", "--runs"):
        expect_error(capsys, lambda flag=flag: final.main([flag, str(project / "nowhere")]), "metrics.json")
