//! What single values become: integers, floats of every width, conversions. Values are the low bits of a
//! `u64`, zeros above.

pub mod convert;
pub mod float;
pub mod integer;
