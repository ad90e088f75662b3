//! Answers over HTTP, and what belongs to serving a pair.

pub mod doctor;
pub mod page;
