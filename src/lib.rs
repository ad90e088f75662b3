//! c2c: language models that talk to each other through their KV-caches (Cache-to-Cache, arXiv 2510.03215).
//!
//! ```text
//! messages ─ tokenizer ─ align ─┬─ sharer   prefill ── queue A ──┐ one event per layer
//!                               └─ receiver prefill ── queue B ──┴─ fuser (queue C) ─ fused pages ─ decode ─ text
//!                                      │                               │
//!                                 cache::PagedKv (one page vocabulary for sharer, receiver and fused caches)
//! ```
//!
//! The modules below are in the order of that road. [`ops`] is the vocabulary the road is written in, [`backend`]
//! what executes it.

pub mod tokenizer;

pub mod align;

pub mod model;

pub mod cache;

pub mod fuser;

pub mod pipeline;

pub mod engine;

pub mod builtin;

pub mod hub;

pub mod data;

pub mod train;

pub mod eval;

pub mod analysis;

pub mod serve;

pub mod command;

pub mod rng;

pub mod durable;

pub mod ops;

pub mod backend;
