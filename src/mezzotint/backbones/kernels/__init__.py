"""Operations for which torch's own kernels are slow, each equal to them to rounding."""
