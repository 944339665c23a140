"""lm-evaluation-harness gives a converted model the log-likelihoods that it should."""

import json

import pytest
import torch
import yaml

from supra.conversion.convert import convert
from supra.testing import tiny_checkpoint


@pytest.fixture(scope="module")
def folders(tmp_path_factory):
    """One teacher and what it converts to."""
    where = tmp_path_factory.mktemp("harness")
    tiny_checkpoint(where / "teacher", num_hidden_layers=3)
    convert(str(where / "teacher"), where / "softmax", mixer="softmax")
    convert(str(where / "teacher"), where / "supra", mixer="supra")
    convert(str(where / "teacher"), where / "hybrid", mixer="supra", keep_attention=[1])
    return where


TASKS = {
    "local_choice": {
        "output_type": "multiple_choice",
        "doc_to_text": "{{question}}",
        "doc_to_choice": "{{choices}}",
        "doc_to_target": "{{answer}}",
        "metric_list": [{"metric": "acc"}],
    },
    "local_text": {
        "output_type": "loglikelihood_rolling",
        "doc_to_text": "",
        "doc_to_target": "{{text}}",
        "metric_list": [{"metric": "word_perplexity"}],
    },
}


@pytest.fixture(scope="module")
def tasks(tmp_path_factory):
    """Two tasks of a local file: seven questions of unequal lengths, and as many texts."""
    folder = tmp_path_factory.mktemp("tasks")
    with open(folder / "data.json", "w") as file:
        for n in range(7):
            question = "The river rises " + "in the hills and " * n + "runs to the"
            text = f"In 18{n}3 the bridge was built. " * (1 + 3 * n)
            choices = [" sea", " hills in the south of the valley", f" {n}"]
            print(
                json.dumps({"question": question, "choices": choices, "answer": 0, "text": text}),
                file=file,
            )
    for name, task in TASKS.items():
        task = {
            "task": name,
            "dataset_path": "json",
            "dataset_kwargs": {"data_files": {"test": str(folder / "data.json")}},
            "test_split": "test",
            **task,
        }
        (folder / f"{name}.yaml").write_text(yaml.safe_dump(task))
    return folder


@pytest.fixture(scope="module")
def log_likelihoods(folders, tasks, tmp_path_factory):
    """A function (model, batch size) -> every log-likelihood that the harness got, in order."""
    pytest.importorskip("lm_eval", reason="needs lm-eval 0.4.13 or newer")
    import datasets
    from lm_eval import simple_evaluate
    from lm_eval.models.huggingface import HFLM
    from lm_eval.tasks import TaskManager

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(datasets.config, "HF_DATASETS_CACHE", tmp_path_factory.mktemp("cache"))
        manager = TaskManager(include_path=str(tasks), include_defaults=False)

        def run(name, batch_size):
            model = HFLM(
                pretrained=str(folders / name),
                backend="causal",
                device="cpu",
                dtype="float32",
                batch_size=batch_size,
                max_length=128,
            )
            results = simple_evaluate(
                model=model, tasks=list(TASKS), task_manager=manager, bootstrap_iters=0
            )
            values = []
            for task in TASKS:
                for sample in results["samples"][task]:
                    for response in sample["resps"]:
                        value = response[0] if isinstance(response[0], (tuple, list)) else response
                        values.append(float(value[0]))
            return torch.tensor(values, dtype=torch.float64)

        yield run


def test_harness_softmax_is_the_original(log_likelihoods):
    alone, batched = log_likelihoods("teacher", 1), log_likelihoods("teacher", 4)
    assert len(alone) == 7 * 3 + 7
    assert torch.equal(log_likelihoods("softmax", 1), alone)
    assert torch.equal(log_likelihoods("softmax", 4), batched)
    torch.testing.assert_close(batched, alone, atol=0, rtol=1e-6)


@pytest.mark.parametrize("name", ["supra", "hybrid"])
def test_harness_batched_is_unbatched(log_likelihoods, name):
    alone, batched = log_likelihoods(name, 1), log_likelihoods(name, 4)
    torch.testing.assert_close(batched, alone, atol=0, rtol=1e-6)
    assert not torch.allclose(alone, log_likelihoods("softmax", 1), rtol=1e-3)
