"""Is a sentence happy or sad? A recurrent network from scratch, every step in sight.

The network reads a sentence word by word and answers at the end ("many to one"). A word is a
one-hot vector x_t of 18 numbers; the state h_t of 64 numbers is all the network remembers::

    h_0 = 0,    h_t = tanh(W_ih x_t + b_ih + W_hh h_{t-1} + b_hh),    t = 1 … T
    p   = softmax(W h_T + b)        how likely it is negative, and positive
    L   = -log p[target]            the loss: cross-entropy

Training follows the gradient of L downhill, one sentence at a time. Going backward through the same
equations, last to first, gives it::

    dlogits  = p - onehot(target),    dW = dlogits h_Tᵀ,    db = dlogits,    dh_T = Wᵀ dlogits
    da_t     = (1 - h_t²) dh_t                              t = T … 1
    dW_ih   += da_t x_tᵀ,    dW_hh += da_t h_{t-1}ᵀ,    db_ih += da_t,    db_hh += da_t
    dh_{t-1} = W_hhᵀ da_t

``forward_by_hand`` and ``backward_by_hand`` are these lines in NumPy. The training itself lets
``fastrnn.RNN`` do the recurrent part, which is the same to the last digits and faster.

How do we know that the gradient is right? ``check_gradients`` asks the loss itself: it moves one
parameter w by ±ε and compares the slope (L(w + ε) - L(w - ε)) / 2ε with what the backward pass
says, for every parameter of the network, in float64. It also compares fastrnn with the loops in
NumPy. It runs before the training, and would stop it.

Run it: ``python examples/sentiment.py`` (a few seconds).
"""

import time

import fastrnn
import numpy as np

VOCABULARY = "i am this is was not very good bad happy sad right now at all earlier and or".split()
HIDDEN = 64
LEARNING_RATE = 2e-2
EPOCHS = 400
SEED = 0


def sentences():
    """All sentences of a small grammar, with True for the positive ones."""
    endings = {
        "i am": "right now",
        "i was": "earlier",
        "this is": "right now",
        "this was": "earlier",
    }
    for word, other, positive in (
        ("good", "happy", True),
        ("happy", "good", True),
        ("bad", "sad", False),
        ("sad", "bad", False),
    ):
        yield word, positive
        yield f"very {word}", positive
        yield f"not {word}", not positive
        yield f"not very {word}", not positive
        for subject in endings:
            yield f"{subject} {word}", positive
            yield f"{subject} very {word}", positive
            yield f"{subject} not {word}", not positive
        for subject in ("i am", "this was"):
            yield f"{subject} {word} and {other}", positive
        yield f"this was very {word} {endings['this was']}", positive
        yield f"i am not very {word} {endings['i am']}", not positive
        yield f"i am not {word} at all", not positive
        yield f"this is not {word} or {other}", not positive


def encode(sentence):
    """The words' places in the vocabulary, (T,): fastrnn reads integers as one-hot rows."""
    return np.array([VOCABULARY.index(word) for word in sentence.split()])


def make_data(rng):
    """58 sentences to learn from and 20 others to be tested with: (words, target) each."""
    data = [(encode(sentence), int(positive)) for sentence, positive in sentences()]
    order = rng.permutation(len(data))
    return [data[k] for k in order[:58]], [data[k] for k in order[58:78]]


def make_network(rng, init="identity"):
    """The recurrent layer and the weights of the linear layer after it.

    The layer starts from W_hh = I: at first a word is simply added to what was read before, which
    a network that has to remember a "not" for some words builds on easily.
    """
    layer = fastrnn.RNN(len(VOCABULARY), HIDDEN, init=init, dtype="float64", rng=rng)
    bound = 1 / np.sqrt(HIDDEN)
    head = {"weight": rng.uniform(-bound, bound, (2, HIDDEN)), "bias": np.zeros(2)}
    return layer, head


# --- the network, one sentence at a time ---------------------------------------------------------


def softmax(logits):
    e = np.exp(logits - logits.max())  # the largest is exp(0): no overflow
    return e / e.sum()


def forward(layer, head, words):
    """Probabilities (2,) of negative and positive, and what the backward pass needs."""
    _, h, tape = layer.forward(words)  # h (1, 64): the state after the last word
    p = softmax(head["weight"] @ h[0] + head["bias"])
    return p, (h[0], tape)


def backward(head, p, saved, target):
    """Gradients of -log p[target] by every parameter of the layer and of the head."""
    h, tape = saved
    dlogits = p.copy()
    dlogits[target] -= 1
    dhead = {"weight": np.outer(dlogits, h), "bias": dlogits}
    dh = head["weight"].T @ dlogits
    dlayer = tape.backward(None, dh[None]).params  # the loss looks at the last state only
    return dlayer, dhead


def sgd(params, gradients):
    """One step downhill, no component of the gradient counting for more than ±1."""
    for name, gradient in gradients.items():
        params[name] -= LEARNING_RATE * np.clip(gradient, -1, 1)


# --- the recurrent layer again, spelled out -------------------------------------------------------


def forward_by_hand(weights, words):
    """All states h_0 … h_T, (T + 1, 64)."""
    h = [np.zeros(HIDDEN)]
    for word in words:
        x = np.zeros(len(VOCABULARY))
        x[word] = 1
        a = weights["weight_ih_l0"] @ x + weights["bias_ih_l0"]
        a += weights["weight_hh_l0"] @ h[-1] + weights["bias_hh_l0"]
        h.append(np.tanh(a))
    return np.array(h)


def backward_by_hand(weights, words, h, dh):
    """Gradients by the layer's weights, given dh, the gradient by the last state."""
    g = {name: np.zeros_like(weight) for name, weight in weights.items()}
    for t in reversed(range(len(words))):
        x = np.zeros(len(VOCABULARY))
        x[words[t]] = 1
        da = (1 - h[t + 1] ** 2) * dh  # tanh' = 1 - tanh²
        g["weight_ih_l0"] += np.outer(da, x)
        g["weight_hh_l0"] += np.outer(da, h[t])
        g["bias_ih_l0"] += da
        g["bias_hh_l0"] += da
        dh = weights["weight_hh_l0"].T @ da
    return g


def check_gradients(layer, head, words, target, epsilon=1e-5):
    """Largest difference of our gradients from finite differences, and from the loops in NumPy."""
    p, saved = forward(layer, head, words)
    dlayer, dhead = backward(head, p, saved, target)

    def loss():
        h = forward_by_hand(layer.params, words)[-1]
        return -np.log(softmax(head["weight"] @ h + head["bias"])[target])

    from_slope = 0.0
    for params, gradients in ((layer.params, dlayer), (head, dhead)):
        for name, gradient in gradients.items():
            for place in np.ndindex(gradient.shape):
                value = params[name][place]
                params[name][place] = value + epsilon
                above = loss()
                params[name][place] = value - epsilon
                below = loss()
                params[name][place] = value
                slope = (above - below) / (2 * epsilon)
                from_slope = max(from_slope, abs(slope - gradient[place]))

    h = forward_by_hand(layer.params, words)
    dlogits = p - np.eye(2)[target]
    by_hand = backward_by_hand(layer.params, words, h, head["weight"].T @ dlogits)
    from_hand = max(abs(by_hand[name] - dlayer[name]).max() for name in by_hand)
    return from_slope, from_hand


# --- training -------------------------------------------------------------------------------------


def measure(layer, head, data):
    """Mean loss and share of right answers."""
    p = np.array([forward(layer, head, words)[0] for words, _ in data])
    targets = np.array([target for _, target in data])
    loss = -np.log(p[np.arange(len(data)), targets]).mean()
    return loss, (p.argmax(axis=1) == targets).mean()


def main():
    begin = time.perf_counter()
    rng = np.random.default_rng(SEED)
    train, test = make_data(rng)
    layer, head = make_network(rng)

    # Checked where no weight and no state is near 0, so that no term of the gradient hides.
    from_slope, from_hand = check_gradients(
        *make_network(rng, init="uniform"), encode("not very good"), target=0
    )
    print(f"gradients: {from_slope:.0e} from finite differences, {from_hand:.0e} from the loops")
    if from_slope > 1e-8 or from_hand > 1e-12:
        raise SystemExit("the backward pass is wrong")

    for epoch in range(1, EPOCHS + 1):
        for k in rng.permutation(len(train)):
            words, target = train[k]
            p, saved = forward(layer, head, words)
            dlayer, dhead = backward(head, p, saved, target)
            sgd(layer.params, dlayer)
            sgd(head, dhead)
        if epoch % 100 == 0:
            loss, accuracy = measure(layer, head, train)
            test_loss, test_accuracy = measure(layer, head, test)
            print(
                f"epoch {epoch}   train loss {loss:.3f}, accuracy {accuracy:4.0%}"
                f"   test loss {test_loss:.3f}, accuracy {test_accuracy:4.0%}"
            )

    for sentence in ("i am not very good right now", "this is not sad or bad"):
        p, _ = forward(layer, head, encode(sentence))
        print(f'"{sentence}" → {("negative", "positive")[p.argmax()]} ({p.max():.1%})')
    print(f"{time.perf_counter() - begin:.1f} s")


if __name__ == "__main__":
    main()
