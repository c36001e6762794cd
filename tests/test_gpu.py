"""What only a GPU can show (`pytest -m gpu`), and what fake tensors show of it without one."""
import torch
import torch.nn as nn
from torch._subclasses.fake_tensor import FakeTensorMode

from machinery.optim import Sharded


def test_a_resumed_sharded_optimizer_has_all_of_its_state_on_the_gpu_where_fused_adam_wants_it():
    with FakeTensorMode():
        params = [nn.Parameter(torch.empty(n, device="cuda")) for n in (4, 3)]
        optimizer = Sharded(torch.optim.Adam, params, lr=1.0, fused=True)
        saved = {i: dict(step=torch.tensor(2.0), exp_avg=torch.zeros(len(p)),
                         exp_avg_sq=torch.zeros(len(p))) for i, p in enumerate(params)}
        group = optimizer.own.state_dict()["param_groups"][0]
        optimizer.load_state_dict(dict(state=saved, param_groups=[group]))
        for p in params:
            state = optimizer.own.state[p]
            assert {t.device.type for t in state.values()} == {"cuda"}
            assert state["step"].dtype == torch.float32
