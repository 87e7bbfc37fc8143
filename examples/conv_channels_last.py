"""A convolution in the Keras manner: ``Conv2D(32, (3, 3), activation="relu")`` on images [N, H, W, C].

Keras keeps channels last in the shape; torch keeps the shape [N, C, H, W] and can keep the channels last in memory. The
transpose below moves no data: it gives the same bytes the name that torch knows them by, and the kernels read them as
they lie.

    python examples/conv_channels_last.py
"""

import torch

import tritune


def main() -> None:
    torch.manual_seed(0)
    images = torch.rand(8, 28, 28, 3)  # as Keras has them
    x = images.permute(0, 3, 1, 2)
    assert x.is_contiguous(memory_format=torch.channels_last)

    # One operator: convolution, bias and relu, forward and backward.
    ours = tritune.nn.Conv2d(3, 32, 3, activation="relu").to(memory_format=torch.channels_last)
    # torch: two, with the output written and read once more between them.
    theirs = torch.nn.Sequential(torch.nn.Conv2d(3, 32, 3), torch.nn.ReLU()).to(memory_format=torch.channels_last)
    theirs[0].load_state_dict(ours.state_dict())

    features = ours(x).permute(0, 2, 3, 1)  # [8, 26, 26, 32], as Keras would give them
    wanted = theirs(x).permute(0, 2, 3, 1)
    torch.testing.assert_close(features, wanted)
    assert features.is_contiguous()
    print(f"images {list(images.shape)} -> features {list(features.shape)}")
    print(f"largest difference to torch: {(features - wanted).abs().max():.1e}")
    print(tritune.explain(ours, x)[0])


if __name__ == "__main__":
    main()
