"""2-D convolution whose kernel gradient stays fast on CPU under `jax.vmap` and inside `jax.lax.scan`."""

import functools
import math
from collections.abc import Sequence
from typing import Any

import jax
import jax.numpy as jnp
from flax import nnx
from jax import lax

# Examples per matmul group of the CPU kernel gradient: small enough that the slices of one group stay in cache,
# large enough to amortise the loop.
_GROUP = 8

_Padding = str | tuple[tuple[int, int], tuple[int, int]]


@functools.partial(jax.custom_vjp, nondiff_argnums=(2, 3))
def conv2d(x: jax.Array, kernel: jax.Array, strides: tuple[int, int] = (1, 1), padding: _Padding = "SAME") -> jax.Array:
    """Convolves a batch of images with a kernel.

    Equal to `jax.lax.conv_general_dilated` in value and in reverse-mode gradients of any order. Only the algorithm of
    the kernel gradient differs, and only where the program is lowered for CPU.

    Args:
      x: Images, floating, shape `(n, height, width, in)`.
      kernel: Filters, same dtype as `x`, shape `(kernel_height, kernel_width, in, out)`.
      strides: Steps between windows along height and width.
      padding: `'SAME'`, `'VALID'`, or zeros before and after along height and width, such as `((1, 1), (1, 1))`.

    Returns:
      Array of the dtype of `x` and shape `(n, out_height, out_width, out)`.

    Raises:
      ValueError: If `x` or `kernel` is not four-dimensional, or `padding` is unknown.
      TypeError: If shapes or dtypes of `x` and `kernel` do not match, or under forward-mode differentiation
          (`jax.jvp` of the function itself; `jax.jvp` of its gradient works), which `jax.custom_vjp` does not offer.

    Example:
      >>> x, kernel = jnp.ones((1, 4, 4, 1)), jnp.ones((3, 3, 1, 2))
      >>> conv2d(x, kernel, (2, 2), "SAME").shape
      (1, 2, 2, 2)
      >>> jax.grad(lambda k: conv2d(x, k, (1, 1), "VALID").sum())(kernel)[0, 0, 0, 0].item()
      4.0
    """
    return _xla_conv(x, kernel, strides, padding)


def _xla_conv(x, kernel, strides, padding):
    if x.ndim != 4 or kernel.ndim != 4:
        raise ValueError(f"conv2d takes a 4-D x and a 4-D kernel, got shapes {x.shape} and {kernel.shape}.")
    if isinstance(padding, str) and padding not in ("SAME", "VALID"):
        raise ValueError(f"padding must be 'SAME', 'VALID' or two pairs of integers, got {padding!r}.")
    return lax.conv_general_dilated(x, kernel, strides, padding, dimension_numbers=("NHWC", "HWIO", "NHWC"))


def _forward(x, kernel, strides, padding):
    # Not conv2d, whose custom rule would prevent jax.jvp from differentiating a gradient.
    return _xla_conv(x, kernel, strides, padding), (x, kernel)


def _backward(strides, padding, residuals, dy):
    x, kernel = residuals
    (dx,) = jax.linear_transpose(lambda x: _xla_conv(x, kernel, strides, padding), x)(dy)
    # Chosen when lowering, not from the default backend, so that programs compiled ahead of time for another
    # platform get the rule of that platform.
    dkernel = lax.platform_dependent(
        x,
        dy,
        cpu=functools.partial(_matmul_kernel_gradient, kernel=kernel, strides=strides, padding=padding),
        default=functools.partial(_xla_kernel_gradient, kernel=kernel, strides=strides, padding=padding),
    )
    return dx, dkernel


conv2d.defvjp(_forward, _backward)


def _xla_kernel_gradient(x, dy, *, kernel, strides, padding):
    (dkernel,) = jax.linear_transpose(lambda k: _xla_conv(x, k, strides, padding), kernel)(dy)
    return dkernel


def _matmul_kernel_gradient(x, dy, *, kernel, strides, padding):
    # XLA's own kernel gradient becomes a grouped convolution when x and dy are batched, and a naive loop nest in the
    # body of a while loop; the CPU backend is slow at both, while matmuls keep their speed. Milliseconds on two cores,
    # XLA's -> these, for 3x3 kernels and a batch of 128, or 2 x 64 under vmap:
    #   128x32x32x16 -> 16            plain 6.5 -> 8.7, vmap 42 -> 10,  scan 680 -> 7.8
    #   128x16x16x32 -> 32            plain 5.7 -> 4.5, vmap 33 -> 4.7, scan 720 -> 4.1
    #   128x8x8x64 -> 64              plain 4.7 -> 3.8, vmap 17 -> 3.2, scan 610 -> 3.8
    #   128x32x32x16 -> 32, stride 2  plain 4.3 -> 3.0, vmap 11 -> 3.7, scan 340 -> 3.3
    # One matmul over patches of the whole batch took up to 54, limited by memory traffic.
    kernel_height, kernel_width, _, _ = kernel.shape
    n, out_height, out_width, _ = dy.shape
    accumulator = jnp.promote_types(kernel.dtype, jnp.float32)
    if padding != "VALID":
        if padding == "SAME":
            padding = lax.padtype_to_pads(x.shape[1:3], kernel.shape[:2], strides, padding)
        x = jnp.pad(x, ((0, 0), *padding, (0, 0)))

    def add_group(total, group):
        x, dy = group

        def at_offset(i, j):
            rows = slice(i, i + strides[0] * out_height, strides[0])
            columns = slice(j, j + strides[1] * out_width, strides[1])
            # One product per example, summed after, is about 1.3 times faster than one product over all examples.
            products = jnp.einsum("nhwi,nhwo->nio", x[:, rows, columns], dy, preferred_element_type=accumulator)
            return products.sum(axis=0)

        offsets = [[at_offset(i, j) for j in range(kernel_width)] for i in range(kernel_height)]
        return total + jnp.array(offsets), None

    size = math.gcd(n, _GROUP)
    groups = jax.tree.map(lambda a: a.reshape(n // size, size, *a.shape[1:]), (x, dy))
    total, _ = lax.scan(add_group, jnp.zeros(kernel.shape, accumulator), groups)
    return total.astype(kernel.dtype)


def _conv_general_dilated(lhs, rhs, window_strides, padding, *, out_sharding=None, **_):
    # Conv leaves every other option of nnx.Conv at the value that conv2d assumes.
    if out_sharding is not None:
        raise NotImplementedError("Conv does not support out_sharding.")
    return conv2d(lhs, rhs, window_strides, padding if isinstance(padding, str) else tuple(padding))


class Conv(nnx.Conv):
    """`flax.nnx.Conv` for batches of 2-D images, computed by `conv2d`.

    Parameters, their names, shapes and initial values are those of `flax.nnx.Conv`.

    Args:
      in_features: Number of input channels.
      out_features: Number of output channels.
      kernel_size: Height and width of the kernel.
      strides: One step for both axes, or one for height and one for width.
      padding: `'SAME'`, `'VALID'`, or the number of zeros on every side of the image, as in PyTorch.
      use_bias: Whether to add a bias per output channel.
      rngs: Source of the key of the parameters.
      **kwargs: `dtype`, `param_dtype`, `kernel_init` or `bias_init` of `flax.nnx.Conv`.

    Raises:
      ValueError: If `padding` is unknown or `kernel_size` does not have two entries.
      TypeError: If another option of `flax.nnx.Conv` is given.
      NotImplementedError: If called with `out_sharding`.

    Example:
      >>> layer = Conv(3, 16, (3, 3), strides=2, rngs=nnx.Rngs(0))
      >>> layer(jnp.zeros((8, 32, 32, 3))).shape
      (8, 16, 16, 16)
    """

    def __init__(
        self,
        in_features: int,
        out_features: int,
        kernel_size: Sequence[int],
        strides: int | tuple[int, int] = 1,
        *,
        padding: str | int = "SAME",
        use_bias: bool = True,
        rngs: nnx.Rngs,
        **kwargs: Any,
    ):
        if padding not in ("SAME", "VALID") and not (isinstance(padding, int) and padding >= 0):
            raise ValueError(f"padding must be 'SAME', 'VALID' or a number of zeros, got {padding!r}.")
        if len(kernel_size) != 2:
            raise ValueError(f"kernel_size must have two entries, got {tuple(kernel_size)}.")
        if unsupported := kwargs.keys() - {"dtype", "param_dtype", "kernel_init", "bias_init"}:
            raise TypeError(f"Conv does not support {sorted(unsupported)}.")
        super().__init__(
            in_features,
            out_features,
            kernel_size,
            strides,
            padding=padding,
            use_bias=use_bias,
            conv_general_dilated=_conv_general_dilated,
            rngs=rngs,
            **kwargs,
        )
