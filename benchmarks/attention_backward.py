"""Time of attention's forward and backward pass on this CPU, fused against plain, float32 against bfloat16.

python benchmarks/attention_backward.py    (one thread; the bundled teacher's cross-attention: 64 queries, 24 keys)
"""

import time

import torch
import torch.nn.functional as F
from torch.nn.attention import SDPBackend, sdpa_kernel

torch.set_num_threads(1)
print(f"torch {torch.__version__}; milliseconds, best of 5")
for dtype in (torch.float32, torch.bfloat16):
    q = torch.randn(128, 6, 64, 32, dtype=dtype, requires_grad=True)
    k = torch.randn(128, 6, 24, 32, dtype=dtype, requires_grad=True)
    mask = torch.zeros(128, 6, 1, 24, dtype=dtype)
    for backend in (SDPBackend.MATH, SDPBackend.FLASH_ATTENTION):
        forward, backward = [], []
        for _ in range(5):
            with sdpa_kernel(backend):
                start = time.perf_counter()
                out = F.scaled_dot_product_attention(q, k, k, attn_mask=mask)
                middle = time.perf_counter()
                out.sum().backward()
            forward.append(middle - start)
            backward.append(time.perf_counter() - middle)
        print(f"{dtype} {backend.name:16} forward {1e3 * min(forward):6.1f}  backward {1e3 * min(backward):6.1f}")
