//! Answers over HTTP, and what belongs to serving a pair.

pub mod details;
pub mod doctor;
pub mod page;
