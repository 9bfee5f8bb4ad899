"""Which answers lm-evaluation-harness may reuse, with a stand-in for it: it knows them by their request alone."""

from __future__ import annotations

import shutil
import sys
from importlib.machinery import ModuleSpec
from types import ModuleType

import pytest


@pytest.fixture
def caches(monkeypatch):
    """The names of the logs that the harness's answers are kept in, in the order of its calls; it asks nothing."""
    given: list[str] = []
    names = ("lm_eval", "lm_eval.tasks", "laddpo.evaluation.harness_model")
    harness, tasks, model = modules = [ModuleType(name) for name in names]
    for name, module in zip(names, modules, strict=True):
        module.__spec__ = ModuleSpec(name, None)
        monkeypatch.setitem(sys.modules, name, module)

    class TaskManager:
        def __init__(self, include_path=None):
            pass

        def match_tasks(self, names):
            return names

    class HarnessModel:
        loglikelihood = loglikelihood_rolling = generate_until = None

        def __init__(self, *_, **__):
            pass

        def set_cache_hook(self, hook):
            self.log = hook.log.path.name

    def simple_evaluate(*, model, **_):
        given.append(model.log)
        return {"results": {"sums": {"acc,none": 0.5}}}

    tasks.TaskManager, harness.simple_evaluate, model.HarnessModel = TaskManager, simple_evaluate, HarnessModel
    return given


def test_answers_are_reused_for_the_same_weights_and_settings_alone(stages, caches):
    run, out = stages.folder / "run", stages.folder / "out"
    quick = ["optim.max_train_steps=1", "optim.learning_rate=1", "evaluation.at_end=false", "evaluation.tasks=[]"]
    assert stages.run("train", f"output_dir={run}", *quick, "best_metric=loss") == 0

    def asked(*more: str) -> list[str]:
        caches.clear()
        given = ["evaluation=lm_eval", "evaluation.tasks=[sums]", f"output_dir={out}", "resume=true", *more]
        assert stages.run("evaluate", f"run={run}", "evaluation.num_pairs=1", *given) == 0
        return list(caches)

    base, tuned = asked()
    assert base.startswith("harness_base_") and tuned.startswith("harness_tuned_")
    assert not {base, tuned} & set(asked("evaluation.temperature=0.5", "evaluation.elbo_draws=4"))
    shutil.rmtree(run / "adapter")
    shutil.copytree(run / "adapter_last", run / "adapter")
    same, other = asked("evaluation.limit=3")
    assert same == base and other != tuned
