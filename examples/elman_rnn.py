"""``nn.RNN(3, 4, 1)``: three features, four hidden units, one layer, on input that it accepts; then an Elman network
with its output head, over a sequence and step by step.

    python examples/elman_rnn.py
"""

import torch

import tritune


def main() -> None:
    torch.manual_seed(0)
    # [steps, sequences, features]: the last size must be input_size, and states are [layers, sequences, hidden units].
    x, h0 = torch.randn(5, 2, 3), torch.zeros(1, 2, 4)

    ours, theirs = tritune.nn.RNN(3, 4, 1), torch.nn.RNN(3, 4, 1)
    ours.load_state_dict(theirs.state_dict())
    (out, h_n), (wanted, wanted_h_n) = ours(x, h0), theirs(x, h0)
    torch.testing.assert_close((out, h_n), (wanted, wanted_h_n))
    print(f"nn.RNN(3, 4, 1): {list(x.shape)} -> {list(out.shape)}, last state {list(h_n.shape)}")
    print(f"largest difference to torch: {(out - wanted).abs().max():.1e}")

    # h = tanh(W_hh h + W_xh x + b_h), o = W_ho h + b_o, y = tanh(W_yh o)
    net = tritune.nn.ElmanRNN(3, 4, 2)
    y, o, last = net(x)
    h = torch.zeros(2, 4)
    for t, x_t in enumerate(x):
        h, o_t, y_t = net.step(x_t, h)
        torch.testing.assert_close((o_t, y_t), (o[t], y[t]))
    torch.testing.assert_close(h, last)
    print(f"ElmanRNN(3, 4, 2): {list(x.shape)} -> y {list(y.shape)}; step by step the same")
    print(tritune.explain(net, x)[0])


if __name__ == "__main__":
    main()
