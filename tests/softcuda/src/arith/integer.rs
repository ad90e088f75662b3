//! Integers (PTX ISA 9.0, "Integer Arithmetic Instructions", "Logic and Shift Instructions").

/// The low `bits` of the value, sign-extended.
pub fn signed(value: u64, bits: u32) -> i64 {
    (value << (64 - bits)) as i64 >> (64 - bits)
}

pub fn mask(bits: u32) -> u64 {
    if bits >= 64 { u64::MAX } else { (1 << bits) - 1 }
}

/// The full product of two values of `bits`.
pub fn product(a: u64, b: u64, bits: u32, is_signed: bool) -> i128 {
    if is_signed {
        i128::from(signed(a, bits)) * i128::from(signed(b, bits))
    } else {
        (u128::from(a & mask(bits)) * u128::from(b & mask(bits))) as i128
    }
}

/// Division by zero gives all ones, as cards do; PTX leaves it open.
pub fn divide(a: u64, b: u64, bits: u32, is_signed: bool) -> u64 {
    let quotient = if b & mask(bits) == 0 {
        u64::MAX
    } else if is_signed {
        signed(a, bits).wrapping_div(signed(b, bits)) as u64
    } else {
        (a & mask(bits)) / (b & mask(bits))
    };
    quotient & mask(bits)
}

/// The rest of a division by zero is the dividend, as cards have it; PTX leaves it open.
pub fn remainder(a: u64, b: u64, bits: u32, is_signed: bool) -> u64 {
    let rest = if b & mask(bits) == 0 {
        a
    } else if is_signed {
        signed(a, bits).wrapping_rem(signed(b, bits)) as u64
    } else {
        (a & mask(bits)) % (b & mask(bits))
    };
    rest & mask(bits)
}

/// Shifts by the width or more give 0, or the sign everywhere.
pub fn shift_left(a: u64, by: u64, bits: u32) -> u64 {
    let by = by as u32;
    if by >= bits { 0 } else { a << by & mask(bits) }
}

pub fn shift_right(a: u64, by: u64, bits: u32, is_signed: bool) -> u64 {
    let by = by as u32;
    if is_signed {
        (signed(a, bits) >> by.min(bits - 1)) as u64 & mask(bits)
    } else if by >= bits {
        0
    } else {
        (a & mask(bits)) >> by
    }
}

/// `shf`: 32 bits of `high:low`, shifted. `wrap`: by the low five bits of `by`, else by at most 32.
pub fn funnel(low: u64, high: u64, by: u64, left: bool, wrap: bool) -> u64 {
    let both = (high & mask(32)) << 32 | low & mask(32);
    let by = if wrap { by as u32 & 31 } else { (by as u32).min(32) };
    (if left { (both << by) >> 32 } else { both >> by }) & mask(32)
}

/// `bfe`: `length` bits from `start`, beyond the top the sign or zeros.
pub fn extract(a: u64, start: u64, length: u64, bits: u32, is_signed: bool) -> u64 {
    let (start, length) = ((start & 0xff) as u32, (length & 0xff) as u32);
    if length == 0 {
        return 0;
    }
    let a = a & mask(bits);
    let field = if start < bits { a >> start } else { 0 };
    let last = (start + length - 1).min(bits - 1);
    let available = if start < bits { (bits - start).min(length) } else { 0 };
    let field = field & mask(available);
    if is_signed && a >> last & 1 == 1 { (field | !mask(available)) & mask(bits) } else { field }
}

/// `bfi`: the low `length` bits of `a` put into `b` at `start`.
pub fn insert(a: u64, b: u64, start: u64, length: u64, bits: u32) -> u64 {
    let (start, length) = ((start & 0xff) as u32, (length & 0xff) as u32);
    if start >= bits || length == 0 {
        return b & mask(bits);
    }
    let field = mask(length.min(bits - start)) << start;
    (b & !field | (a << start) & field) & mask(bits)
}

/// `prmt` without a mode: each nibble of the selector picks one of eight bytes, or its sign.
pub fn permute(a: u64, b: u64, selector: u64) -> u64 {
    let bytes = (b & mask(32)) << 32 | a & mask(32);
    (0..4).fold(0, |result, place| {
        let pick = selector >> (4 * place) & 0xf;
        let byte = bytes >> (8 * (pick & 7)) & 0xff;
        let byte = if pick & 8 == 0 { byte } else { (byte >> 7) * 0xff };
        result | byte << (8 * place)
    })
}

/// The selector that a mode of `prmt` stands for, from the low two bits of its third operand.
pub fn permute_selector(mode: &str, c: u64) -> Option<u64> {
    let c = (c & 3) as usize;
    let table: [u64; 4] = match mode {
        "f4e" => [0x3210, 0x4321, 0x5432, 0x6543],
        "b4e" => [0x5670, 0x6701, 0x7012, 0x0123],
        "rc8" => [0x0000, 0x1111, 0x2222, 0x3333],
        "ecl" => [0x3210, 0x3211, 0x3222, 0x3333],
        "ecr" => [0x0000, 0x1110, 0x2210, 0x3210],
        "rc16" => [0x1010, 0x3232, 0x1010, 0x3232],
        _ => return None,
    };
    Some(table[c])
}

/// `lop3`: bit by bit the entry of `table` at `a·4 + b·2 + c`.
pub fn lookup(a: u64, b: u64, c: u64, table: u64) -> u64 {
    let mut result = 0;
    for entry in 0..8 {
        if table >> entry & 1 == 1 {
            let pick = |value: u64, bit: u64| if entry & bit != 0 { value } else { !value };
            result |= pick(a, 4) & pick(b, 2) & pick(c, 1);
        }
    }
    result & mask(32)
}

/// The dot product of four bytes with four bytes, plus `c` (`dp4a`).
pub fn dot_bytes(a: u64, b: u64, c: u64, a_signed: bool, b_signed: bool) -> u64 {
    let byte = |value: u64, place: u64, is_signed: bool| {
        let byte = value >> (8 * place) & 0xff;
        if is_signed { signed(byte, 8) } else { byte as i64 }
    };
    let sum: i64 = (0..4).map(|place| byte(a, place, a_signed) * byte(b, place, b_signed)).sum();
    (c as u32).wrapping_add(sum as u32).into()
}

/// The dot product of two halves with the low or the high two bytes of b, plus `c` (`dp2a`).
pub fn dot_halves(a: u64, b: u64, c: u64, a_signed: bool, b_signed: bool, high: bool) -> u64 {
    let half = |place: u64| {
        let half = a >> (16 * place) & 0xffff;
        if a_signed { signed(half, 16) } else { half as i64 }
    };
    let byte = |place: u64| {
        let byte = b >> (8 * place + if high { 16 } else { 0 }) & 0xff;
        if b_signed { signed(byte, 8) } else { byte as i64 }
    };
    let sum = half(0) * byte(0) + half(1) * byte(1);
    (c as u32).wrapping_add(sum as u32).into()
}

/// `bfind`: the place of the highest bit that is not the sign, or all ones.
pub fn find_top(a: u64, bits: u32, is_signed: bool, as_shift: bool) -> u64 {
    let a = if is_signed && signed(a, bits) < 0 { !a } else { a } & mask(bits);
    if a == 0 {
        return mask(32);
    }
    let top = 63 - a.leading_zeros();
    u64::from(if as_shift { bits - 1 - top } else { top })
}
