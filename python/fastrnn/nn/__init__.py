"""What a model needs besides recurrent layers: modules without state, Sequential, losses.

Every module has ``params``, ``flat``, ``config()``, ``state_dict()``, ``load_state_dict()``,
``to(device)`` and ``freeze()``; ``module(x)`` computes, ``module.forward(x)`` computes and returns
a tape, whose ``backward(dy)`` returns ``fastrnn.Gradients``.
"""

from fastrnn.nn.dropout import Dropout
from fastrnn.nn.embedding import Embedding
from fastrnn.nn.linear import Linear
from fastrnn.nn.losses import mean_squared_error, softmax_cross_entropy
from fastrnn.nn.sequential import Sequential

__all__ = [
    "Dropout",
    "Embedding",
    "Linear",
    "Sequential",
    "mean_squared_error",
    "softmax_cross_entropy",
]
