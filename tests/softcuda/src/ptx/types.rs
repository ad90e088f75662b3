//! The types of registers, operands and memory (PTX ISA 9.0, "Types").

#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Class {
    /// `.b`, untyped bits.
    Bits,
    Unsigned,
    Signed,
    Float,
    Bf16,
}

/// A type of a given width; two packed halves have `pair`.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Type {
    pub class: Class,
    /// Of the whole, bits.
    pub bits: u32,
    pub pair: bool,
}

impl Type {
    pub fn of(name: &str) -> Option<Type> {
        let (class, bits, pair) = match name {
            "f16x2" => (Class::Float, 32, true),
            "bf16x2" => (Class::Bf16, 32, true),
            "bf16" => (Class::Bf16, 16, false),
            _ => {
                let (class, digits) = name.split_at_checked(1)?;
                let class = match class {
                    "b" => Class::Bits,
                    "u" => Class::Unsigned,
                    "s" => Class::Signed,
                    "f" => Class::Float,
                    _ => return None,
                };
                (class, digits.parse().ok().filter(|bits| matches!(bits, 8 | 16 | 32 | 64 | 128))?, false)
            }
        };
        Some(Type { class, bits, pair })
    }

    pub fn bytes(self) -> u64 {
        u64::from(self.bits / 8)
    }

    pub fn is_signed(self) -> bool {
        self.class == Class::Signed
    }

    pub fn is_float(self) -> bool {
        matches!(self.class, Class::Float | Class::Bf16)
    }

    /// The bits a value of this type has.
    pub fn mask(self) -> u64 {
        if self.bits >= 64 { u64::MAX } else { (1 << self.bits) - 1 }
    }
}

pub fn bytes_of(name: &str) -> Option<u64> {
    Type::of(name).map(Type::bytes)
}
