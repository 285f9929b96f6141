"""Convolutions of every kind, and what stands between them."""

import torch
import torch.nn.functional as F
from torch import nn

from .case import Cases, classes, numbers

CONV = Cases()


def stack(*layers):
    return nn.Sequential(*layers)


@CONV()
def conv1d():
    """Over (B, C, L)."""
    return numbers(stack(nn.Conv1d(3, 5, 3, padding=1), nn.Tanh(), nn.Conv1d(5, 4, 2, bias=False)), 4, 3, 9)


@CONV()
def conv2d():
    """A small classifier: 3x3, pooling, a Linear."""
    net = stack(
        nn.Conv2d(3, 6, 3, padding=1), nn.ReLU(), nn.MaxPool2d(2), nn.Conv2d(6, 8, 3, padding=1), nn.ReLU(),
        nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(8, 4),
    )  # fmt: skip
    return classes(net, 5, 3, 8, 8)


@CONV()
def conv3d():
    """Over (B, C, D, H, W)."""
    return numbers(stack(nn.Conv3d(2, 3, 2, padding=1), nn.Tanh(), nn.Conv3d(3, 2, (1, 3, 2))), 3, 2, 4, 5, 3)


@CONV()
def conv_square():
    """Batch size, channels, height and width are all 4."""
    return numbers(stack(nn.Conv2d(4, 4, 3, padding=1), nn.Tanh(), nn.Conv2d(4, 4, 1)), 4, 4, 4, 4)


@CONV()
def conv_kernels():
    """1x1, 7x7, 1x5, and a kernel as large as the image."""
    net = stack(
        nn.Conv2d(3, 5, 1), nn.Tanh(), nn.Conv2d(5, 4, 7, padding=3), nn.Tanh(), nn.Conv2d(4, 4, (1, 5)), nn.Tanh(),
        nn.Conv2d(4, 3, (8, 4)),
    )  # fmt: skip
    return numbers(net, 3, 3, 8, 8)


@CONV()
def conv_strides():
    """Stride 2, a stride larger than its kernel, and sizes of which a stride leaves rows unread."""
    net = stack(
        nn.Conv2d(3, 5, 3, stride=2, padding=1), nn.Tanh(), nn.Conv2d(5, 4, 1, stride=2), nn.Tanh(),
        nn.Conv2d(4, 4, 1, stride=(3, 2)),
    )  # fmt: skip
    return numbers(net, 3, 3, 16, 13)


@CONV()
def conv_dilated():
    """Dilation, with stride, over one and two dimensions."""
    net = stack(nn.Conv2d(2, 5, 3, dilation=2, padding=2), nn.Tanh(), nn.Conv2d(5, 3, 2, stride=2, dilation=(1, 3)))
    return numbers(net, 3, 2, 9, 8)


@CONV()
def conv_grouped():
    """Groups, with bias and without."""
    net = stack(nn.Conv2d(4, 6, 3, groups=2, padding=1), nn.Tanh(), nn.Conv2d(6, 9, 2, groups=3, bias=False))
    return numbers(net, 4, 4, 5, 5)


@CONV()
def conv_grouped_strided_dilated():
    """Groups, stride, dilation and padding at once, over one and three dimensions."""
    net = stack(
        nn.Conv1d(4, 6, 3, groups=2, stride=2, dilation=2, padding=3), nn.Tanh(), nn.Unflatten(2, (1, 1, 7)),
        nn.Conv3d(6, 6, (3, 1, 2), groups=3, padding=(1, 0, 1), stride=(2, 1, 1), dilation=(1, 1, 2)),
    )  # fmt: skip
    return numbers(net, 4, 4, 11)


@CONV()
def conv_depthwise():
    """One filter per channel, and two; then 1x1."""
    net = stack(
        nn.Conv2d(5, 5, 3, groups=5, padding=1), nn.Tanh(), nn.Conv2d(5, 10, 3, groups=5, stride=2, padding=1),
        nn.Tanh(), nn.Conv2d(10, 4, 1), nn.Conv2d(4, 4, (1, 3), groups=4, bias=False),
    )  # fmt: skip
    return numbers(net, 4, 5, 6, 7)


@CONV()
def conv_depthwise_1d_3d():
    """The same over one and three dimensions."""
    net = stack(
        nn.Conv1d(4, 4, 5, groups=4, padding=2), nn.Tanh(), nn.Unflatten(2, (2, 2, 3)),
        nn.Conv3d(4, 8, 2, groups=4, padding=1),
    )  # fmt: skip
    return numbers(net, 3, 4, 12)


@CONV()
def conv_padding_same():
    """padding="same": odd and even kernels (more on one side), dilated, and "valid"."""
    net = stack(
        nn.Conv2d(2, 4, 3, padding="same"), nn.Tanh(), nn.Conv2d(4, 4, 4, padding="same"), nn.Tanh(),
        nn.Conv2d(4, 4, (2, 3), padding="same", dilation=(3, 2)), nn.Tanh(), nn.Conv2d(4, 3, 2, padding="valid"),
    )  # fmt: skip
    return numbers(net, 3, 2, 6, 7)


@CONV()
def conv_padding_same_1d_3d():
    """Even kernels with padding="same" over one and three dimensions."""
    net = stack(
        nn.Conv1d(3, 4, 4, padding="same"), nn.Tanh(), nn.Unflatten(2, (2, 2, 3)),
        nn.Conv3d(4, 2, (2, 1, 2), padding="same"),
    )  # fmt: skip
    return numbers(net, 3, 3, 12)


@CONV()
def conv_circular():
    """padding_mode="circular" over one, two and three dimensions, with numbers and with "same"."""
    net = stack(
        nn.Conv1d(3, 4, 3, padding=1, padding_mode="circular"), nn.Tanh(), nn.Unflatten(2, (3, 4)),
        nn.Conv2d(4, 4, (3, 2), padding="same", padding_mode="circular"), nn.Tanh(), nn.Unflatten(2, (3, 1)),
        nn.Conv3d(4, 2, (3, 1, 3), padding=(1, 0, 1), padding_mode="circular"),
    )  # fmt: skip
    return numbers(net, 4, 3, 12)


@CONV()
def conv_reflected():
    """padding_mode="reflect" and "replicate", with stride and groups."""
    net = stack(
        nn.Conv2d(4, 4, 3, padding=2, padding_mode="reflect", groups=2), nn.Tanh(),
        nn.Conv2d(4, 3, 3, padding=(0, 1), padding_mode="replicate", stride=2), nn.Tanh(), nn.Flatten(2),
        nn.Conv1d(3, 2, 4, padding="same", padding_mode="reflect"),
    )  # fmt: skip
    return numbers(net, 4, 4, 5, 6)


@CONV()
def conv_channels_last():
    """Inputs and weights in the memory format that torch recommends."""
    net = stack(
        nn.Conv2d(4, 6, 3, padding=1), nn.ReLU(), nn.Conv2d(6, 6, 3, groups=2, stride=2), nn.ReLU(), nn.Conv2d(6, 5, 1)
    )
    problem = numbers(net.to(memory_format=torch.channels_last), 4, 4, 7, 7)
    return numbers_of(problem, problem.inputs[0].to(memory_format=torch.channels_last))


def numbers_of(problem, x):
    return problem.__class__(problem.model, (x,), problem.target, problem.loss)


@CONV()
def conv_of_strided_inputs():
    """Inputs that are slices and transposes of larger tensors."""
    net = stack(nn.Conv2d(3, 5, 3), nn.Tanh(), nn.Conv2d(5, 2, 2))
    return numbers_of(numbers(net, 4, 3, 6, 6), torch.randn(4, 7, 13, 5)[:, ::2].permute(0, 3, 2, 1)[:, 1:4, ::2])


@CONV()
def conv_wide():
    """More channels than a register tile, and more pixels than a block."""
    return numbers(stack(nn.Conv2d(17, 35, 3, padding=1), nn.ReLU(), nn.Conv2d(35, 33, 3, padding=1)), 3, 17, 12, 11)


@CONV()
def transposed_1d():
    """ConvTranspose1d with stride, output_padding, dilation and groups."""
    net = stack(
        nn.ConvTranspose1d(4, 6, 3, stride=2, padding=1, output_padding=1), nn.Tanh(),
        nn.ConvTranspose1d(6, 4, 2, groups=2, dilation=3, bias=False),
    )  # fmt: skip
    return numbers(net, 3, 4, 5)


@CONV()
def transposed_2d():
    """The same over two dimensions."""
    net = stack(
        nn.ConvTranspose2d(4, 6, 3, stride=2, padding=1, output_padding=1, groups=2), nn.Tanh(),
        nn.ConvTranspose2d(6, 3, (2, 3), dilation=(2, 1), groups=3), nn.Tanh(), nn.ConvTranspose2d(3, 2, 1, stride=2),
    )  # fmt: skip
    return numbers(net, 3, 4, 3, 4)


@CONV()
def transposed_3d():
    """And over three."""
    net = stack(
        nn.ConvTranspose3d(2, 4, 2, stride=(2, 1, 2), output_padding=(1, 0, 0)),
        nn.Tanh(),
        nn.ConvTranspose3d(4, 2, 1, groups=2),
    )
    return numbers(net, 3, 2, 2, 3, 2)


@CONV()
def transposed_depthwise():
    """One filter per channel."""
    return numbers(
        stack(nn.ConvTranspose2d(4, 4, 4, stride=2, padding=1, groups=4), nn.Tanh(), nn.Conv2d(4, 2, 2)), 4, 4, 4, 4
    )


class Functional(nn.Module):
    """Convolutions without a layer: circular padding by F.pad, a raw weight, unfold and a product."""

    def __init__(self):
        super().__init__()
        self.a, self.b = nn.Parameter(torch.randn(4, 2, 3, 3) / 3), nn.Parameter(torch.randn(4))
        self.c, self.d = nn.Parameter(torch.randn(3, 4, 2, 2) / 3), nn.Parameter(torch.randn(3, 2, 2, 2))

    def forward(self, x):
        x = torch.tanh(F.conv2d(F.pad(x, (1, 1, 2, 0), mode="circular"), self.a, self.b))
        patches = F.unfold(x, 2)
        x = F.fold(self.c.view(3, -1) @ patches, tuple(n - 1 for n in x.shape[2:]), 1)
        return F.conv_transpose2d(x, self.d)


@CONV()
def conv_functional():
    """F.pad, F.conv2d, unfold, a weight on the left of a product, F.conv_transpose2d."""
    return numbers(Functional(), 3, 2, 5, 6)


class Between(nn.Module):
    """What stands between convolutions."""

    def __init__(self):
        super().__init__()
        self.a, self.b, self.c = nn.Conv2d(2, 8, 3, padding=1), nn.Conv2d(2, 4, 3, padding=1), nn.Conv2d(16, 3, 1)
        self.d, self.e = nn.Conv2d(3, 3, 3, padding=1), nn.Conv2d(3, 2, 2)

    def forward(self, x):
        x = F.pixel_shuffle(torch.tanh(self.a(x)), 2)
        x = F.pixel_unshuffle(torch.tanh(self.b(x)), 2)
        x = F.interpolate(self.c(x), scale_factor=2, mode="bilinear", align_corners=False)
        x = F.avg_pool2d(torch.roll(torch.tanh(self.d(x)), (1, 2), (2, 3)), 2).flip(-1)
        return F.max_pool2d(self.e(F.interpolate(x, scale_factor=2)), 2)


@CONV()
def between_convolutions():
    """Pixel shuffle and unshuffle, upsampling, rolling, flipping, pooling."""
    return numbers(Between(), 3, 2, 4, 6)


class Unet(nn.Module):
    """Down, up, and a skip by concatenation."""

    def __init__(self):
        super().__init__()
        self.down, self.middle = nn.Conv2d(3, 4, 3, stride=2, padding=1), nn.Conv2d(4, 4, 3, padding=1)
        self.up, self.out = nn.ConvTranspose2d(4, 4, 2, stride=2), nn.Conv2d(7, 2, 3, padding=1)

    def forward(self, x):
        y = self.middle(F.silu(self.down(x)))
        return self.out(torch.cat([x, self.up(F.silu(y, inplace=True))], 1))


@CONV()
def unet():
    """Concatenated channels."""
    return numbers(Unet(), 3, 3, 6, 6)


class SqueezeExcite(nn.Module):
    """Channels times a gate that a pooled copy of them gives."""

    def __init__(self):
        super().__init__()
        self.conv, self.reduce, self.expand = nn.Conv2d(3, 6, 3, padding=1), nn.Conv2d(6, 2, 1), nn.Conv2d(2, 6, 1)
        self.head = nn.Linear(6, 4)

    def forward(self, x):
        x = F.silu(self.conv(x))
        x *= torch.sigmoid(self.expand(F.relu_(self.reduce(x.mean((2, 3), keepdim=True)))))
        return self.head(x.mean((2, 3)))


@CONV()
def squeeze_excite():
    """A gate in place."""
    return classes(SqueezeExcite(), 5, 3, 6, 6)


class Residual(nn.Module):
    """conv - GroupNorm - ReLU twice, everything in place; a 1x1 shortcut where the stride needs one."""

    def __init__(self, channels_in, channels_out, stride=1):
        super().__init__()
        self.conv1, self.norm1 = (
            nn.Conv2d(channels_in, channels_out, 3, stride, 1, bias=False),
            nn.GroupNorm(2, channels_out),
        )
        self.conv2, self.norm2 = (
            nn.Conv2d(channels_out, channels_out, 3, 1, 1, bias=False),
            nn.GroupNorm(2, channels_out),
        )
        self.relu = nn.ReLU(inplace=True)
        self.shortcut = (
            None
            if stride == 1
            else stack(nn.Conv2d(channels_in, channels_out, 1, stride, bias=False), nn.GroupNorm(2, channels_out))
        )

    def forward(self, x):
        identity = x if self.shortcut is None else self.shortcut(x)
        out = self.relu(self.norm1(self.conv1(x)))
        out = self.norm2(self.conv2(out))
        out += identity
        return self.relu(out)


@CONV()
def resnet():
    """Residual blocks with GroupNorm, ReLU and addition in place."""
    net = stack(
        nn.Conv2d(3, 4, 3, 1, 1, bias=False), nn.GroupNorm(2, 4), nn.ReLU(inplace=True), Residual(4, 4), Residual(4, 6, 2),
        nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(6, 4),
    )  # fmt: skip
    return classes(net, 4, 3, 8, 8)


class InPlace(nn.Module):
    """Every output of a layer is changed in place."""

    def __init__(self):
        super().__init__()
        self.a, self.b, self.c = nn.Linear(5, 6), nn.Linear(6, 6), nn.Linear(6, 4)
        self.d = nn.Conv1d(4, 3, 2)

    def forward(self, x):
        x = F.relu_(self.a(x))
        y = self.b(x)
        y += x
        y.mul_(0.5).tanh_()
        z = self.c(y).transpose_(1, 2)
        out = self.d(z)
        out[:, 0] = out[:, 0] * 2
        return out.add_(1.0)


@CONV()
def in_place():
    """relu_, +=, mul_, tanh_, an assignment to a slice, on what layers return."""
    return numbers(InPlace(), 4, 3, 5)


@CONV()
def in_place_of_samples():
    """The same kind of net on (B, D) inputs."""
    net = stack(
        nn.Linear(5, 6),
        nn.ReLU(inplace=True),
        nn.Linear(6, 6),
        nn.Hardtanh(inplace=True),
        nn.Linear(6, 4),
        nn.ELU(inplace=True),
    )
    return numbers(net, 4, 5)


@CONV()
def convnext():
    """Depthwise 7x7, LayerNorm over channels last, LayerScale, a residual."""
    return numbers(stack(ConvNeXt(4), ConvNeXt(4)), 3, 4, 6, 6)


class ConvNeXt(nn.Module):
    def __init__(self, width):
        super().__init__()
        self.depthwise, self.norm = nn.Conv2d(width, width, 7, padding=3, groups=width), nn.LayerNorm(width, eps=1e-6)
        self.wide, self.narrow = nn.Linear(width, 4 * width), nn.Linear(4 * width, width)
        self.gamma = nn.Parameter(torch.full((width,), 0.3))

    def forward(self, x):
        y = self.norm(self.depthwise(x).permute(0, 2, 3, 1))
        return x + (self.gamma * self.narrow(F.gelu(self.wide(y)))).permute(0, 3, 1, 2)
