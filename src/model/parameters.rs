//! The tensors of a decoder as a list in a fixed order: to train them, to make them from nothing, to write them down.

use super::{LayerWeights, ModelConfig, Weights, names};
use crate::{
    backend::Tensor,
    ops::{Weight, WeightPart},
};

/// A tensor that a [`ModelConfig`] calls for.
#[derive(Clone, Debug, PartialEq)]
pub struct Parameter {
    /// transformers' name.
    pub name: String,
    pub shape: Vec<usize>,
    pub role: Role,
}

/// What a tensor is, for its first value.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Role {
    Matrix,
    Norm,
    Bias,
}

/// Of every tensor of a model, an output head that is the embedding left out.
pub fn parameters(config: &ModelConfig) -> Vec<Parameter> {
    let names = names::hugging_face(config.post_norms);
    let (hidden, ffn, biases) = (config.hidden, config.ffn, config.biases);
    let (q, kv) = (config.heads * config.head_dim, config.kv_heads * config.head_dim);
    let mut all = Vec::new();
    let mut push = |name: String, shape: &[usize], role: Role| {
        let ending = if role == Role::Bias { "bias" } else { "weight" };
        all.push(Parameter { name: format!("{name}.{ending}"), shape: shape.to_vec(), role });
    };
    push(format!("model.{}", names.embed), &[config.vocab, hidden], Role::Matrix);
    for n in 0..config.layers {
        let name = |name: &str| format!("model.{}", name.replace("{}", &n.to_string()));
        let mut linear = |part: &str, rows: usize, cols: usize, bias: bool| {
            push(name(part), &[rows, cols], Role::Matrix);
            if bias {
                push(name(part), &[rows], Role::Bias);
            }
        };
        linear(names.q, q, hidden, biases.qkv);
        linear(names.k, kv, hidden, biases.qkv);
        linear(names.v, kv, hidden, biases.qkv);
        linear(names.attn_out, hidden, q, biases.attn_out);
        linear(names.gate, ffn, hidden, biases.ffn);
        linear(names.up, ffn, hidden, biases.ffn);
        linear(names.down, hidden, ffn, biases.ffn);
        push(name(names.attn_norm), &[hidden], Role::Norm);
        push(name(names.ffn_norm), &[hidden], Role::Norm);
        if config.qk_norm {
            push(name(names.q_norm), &[config.head_dim], Role::Norm);
            push(name(names.k_norm), &[config.head_dim], Role::Norm);
        }
        if config.post_norms {
            push(name(names.post_attn_norm), &[hidden], Role::Norm);
            push(name(names.post_ffn_norm), &[hidden], Role::Norm);
        }
    }
    push(format!("model.{}", names.final_norm), &[hidden], Role::Norm);
    if !config.tied {
        push(names.lm_head.into(), &[config.vocab, hidden], Role::Matrix);
    }
    all
}

impl Weights {
    /// From tensors in the order of [`parameters`].
    ///
    /// # Errors
    /// Those of `tensor`.
    pub fn assemble<E>(
        config: &ModelConfig,
        mut tensor: impl FnMut(&Parameter) -> Result<Tensor, E>,
    ) -> Result<Weights, E> {
        let tensors = parameters(config).iter().map(&mut tensor).collect::<Result<Vec<Tensor>, E>>()?;
        let mut tensors = tensors.into_iter();
        let mut next = || tensors.next().expect("as many tensors as parameters");
        let embed = next();
        let biases = config.biases;
        let layers = (0..config.layers).map(|_| {
            let mut part = |bias: bool| WeightPart { matrix: next(), bias: bias.then(&mut next) };
            let qkv = Weight { parts: vec![part(biases.qkv), part(biases.qkv), part(biases.qkv)] };
            let attn_out = Weight { parts: vec![part(biases.attn_out)] };
            let gate_up = Weight { parts: vec![part(biases.ffn), part(biases.ffn)] };
            let down = Weight { parts: vec![part(biases.ffn)] };
            let (attn_norm, ffn_norm) = (next(), next());
            let (q_norm, k_norm) = (config.qk_norm.then(&mut next), config.qk_norm.then(&mut next));
            let (post_attn_norm, post_ffn_norm) =
                (config.post_norms.then(&mut next), config.post_norms.then(&mut next));
            LayerWeights {
                attn_norm,
                qkv,
                q_norm,
                k_norm,
                attn_out,
                post_attn_norm,
                ffn_norm,
                gate_up,
                down,
                post_ffn_norm,
            }
        });
        let layers = layers.collect();
        let final_norm = next();
        let lm_head = Weight::new(if config.tied { embed.clone() } else { next() });
        Ok(Weights { embed, layers, final_norm, lm_head })
    }

    /// Every tensor, in the order of [`parameters`].
    pub fn tensors(&self, config: &ModelConfig) -> Vec<&Tensor> {
        fn parts(weight: &Weight) -> impl Iterator<Item = &Tensor> {
            weight.parts.iter().flat_map(|part| [&part.matrix].into_iter().chain(&part.bias))
        }
        let mut all = vec![&self.embed];
        for layer in &self.layers {
            for weight in [&layer.qkv, &layer.attn_out, &layer.gate_up, &layer.down] {
                all.extend(parts(weight));
            }
            all.extend([&layer.attn_norm, &layer.ffn_norm]);
            all.extend(layer.q_norm.iter().chain(&layer.k_norm));
            all.extend(layer.post_attn_norm.iter().chain(&layer.post_ffn_norm));
        }
        all.push(&self.final_norm);
        if !config.tied {
            all.extend(parts(&self.lm_head));
        }
        all
    }
}
