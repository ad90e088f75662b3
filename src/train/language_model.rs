//! Training one language model: all its weights, or low-rank adapters beside them.

use super::{
    BatchCache, BatchReport, Error, Kept, Labels, Learned, Lora, Parameters, Piece, Recompute, Sample,
    TrainingPass,
    config::{Decay, LoraSettings},
    gradient_pages,
};
use crate::{
    backend::{DType, Event, Precision, Queue},
    durable::{OutgoingTensor, write_safetensors},
    model::{self, Decoder, ModelConfig, Role, Weights},
    ops::{self, IGNORED, KvPages},
    rng::normal,
};
use safetensors::Dtype;
use std::{path::Path, sync::Arc};

/// A model that learns, in f32.
pub struct ModelTrainer {
    pub queue: Queue,
    pub decoder: Arc<Decoder>,
    pub parameters: Parameters,
    pub recompute: Recompute,
    learns: Learns,
    cache: BatchCache,
    pass: Option<TrainingPass>,
    gradients: Option<KvPages>,
}

enum Learns {
    /// The decoder's weights are the parameters; their gradients.
    Weights(Weights),
    /// The decoder is frozen.
    Adapters(Box<Lora>),
}

impl ModelTrainer {
    /// Goes on from `weights`, of any dtype.
    pub fn new(
        queue: Queue,
        config: ModelConfig,
        weights: &Weights,
        recompute: Recompute,
        decay: Decay,
    ) -> Result<Self, Error> {
        Self::with(queue, config, recompute, decay, |queue, parameters, config| {
            let tensors = weights.tensors(config).into_iter().enumerate();
            tensors.into_iter().try_for_each(|(index, tensor)| parameters.set(queue, index, tensor))
        })
    }

    /// From nothing: matrices are normal with the `deviation` (`initializer_range` of config.json), norms 1, biases 0.
    pub fn init(
        queue: Queue,
        config: ModelConfig,
        deviation: f32,
        seed: u64,
        recompute: Recompute,
        decay: Decay,
    ) -> Result<Self, Error> {
        Self::with(queue, config, recompute, decay, |queue, parameters, config| {
            for (index, parameter) in model::parameters(config).iter().enumerate() {
                let view = parameters.view(Kept::Weights, index);
                let values = match parameter.role {
                    Role::Norm => vec![1.0 - config.norm_offset; view.elements()],
                    Role::Bias => vec![0.0; view.elements()],
                    Role::Matrix => {
                        let values = normal(seed, index as u32, view.elements());
                        values.into_iter().map(|x| deviation * x).collect()
                    }
                };
                queue.upload(&values, &view);
            }
            Ok(())
        })
    }

    fn with(
        queue: Queue,
        config: ModelConfig,
        recompute: Recompute,
        decay: Decay,
        fill: impl FnOnce(&Queue, &Parameters, &ModelConfig) -> Result<(), Error>,
    ) -> Result<Self, Error> {
        let list = model::parameters(&config).into_iter().map(|parameter| (parameter.name, parameter.shape));
        let parameters = Parameters::new(&queue, list.collect(), decay)?;
        fill(&queue, &parameters, &config)?;
        let view = |kept: Kept| {
            let mut number = 0..;
            Weights::assemble(&config, |_| {
                Ok::<_, Error>(parameters.view(kept, number.next().unwrap_or_default()))
            })
        };
        let (weights, grads) = (view(Kept::Weights)?, view(Kept::Grad)?);
        let decoder = Arc::new(Decoder { config, weights, precision: Precision::F32 });
        Self::of(queue, decoder, parameters, recompute, Learns::Weights(grads))
    }

    /// New low-rank adapters beside the weights of `decoder`, which may be of any dtype and stay as they are.
    pub fn adapters(
        queue: Queue,
        decoder: &Arc<Decoder>,
        settings: &LoraSettings,
        seed: u64,
        recompute: Recompute,
        decay: Decay,
    ) -> Result<Self, Error> {
        let decoder = match queue.backend().activation_dtype(decoder.precision) {
            DType::F32 => decoder.clone(),
            // What adapters add to is f32.
            _ => {
                let (config, weights) = (decoder.config.clone(), decoder.weights.clone());
                Arc::new(Decoder { config, weights, precision: Precision::F32 })
            }
        };
        let (parameters, lora) = Lora::new(&queue, &decoder.config, settings, seed, decay)?;
        Self::of(queue, decoder, parameters, recompute, Learns::Adapters(Box::new(lora)))
    }

    fn of(
        queue: Queue,
        decoder: Arc<Decoder>,
        parameters: Parameters,
        recompute: Recompute,
        learns: Learns,
    ) -> Result<Self, Error> {
        let cache = BatchCache::new(&queue, &decoder, DType::F32)?;
        Ok(ModelTrainer { queue, decoder, parameters, recompute, learns, cache, pass: None, gradients: None })
    }

    /// The adapters, where it is those that learn.
    pub fn lora(&self) -> Option<&Lora> {
        match &self.learns {
            Learns::Weights(_) => None,
            Learns::Adapters(lora) => Some(lora),
        }
    }

    /// The model as it is now, to ask it something.
    pub fn answering(&self) -> Result<Arc<Decoder>, Error> {
        let Some(lora) = self.lora() else { return Ok(self.decoder.clone()) };
        let Decoder { config, weights, precision } = &*self.decoder;
        let adapter = lora.snapshot(&self.queue, &self.parameters, config, "")?;
        let weights = adapter.merge(config, weights, self.queue.backend())?;
        Ok(Arc::new(Decoder { config: config.clone(), weights, precision: *precision }))
    }

    /// Runs a batch; with `learn` (the update, which keys dropped elements, and a factor of the gradient of the mean loss) all gradients
    /// grow.
    pub fn run(&mut self, samples: &[&Sample], learn: Option<(u32, f32)>) -> Result<BatchReport, Error> {
        let (queue, decoder) = (self.queue.clone(), self.decoder.clone());
        let lengths: Vec<usize> = samples.iter().map(|sample| sample.tokens()).collect();
        let begin = queue.record();
        self.cache.begin(&queue, &decoder, &lengths)?;
        let pieces: Vec<Piece> = samples
            .iter()
            .map(|sample| Piece { ids: &sample.prompt.ids, positions: &sample.prompt.positions })
            .collect();
        let batch = self.cache.append(&queue, &decoder, &pieces)?;
        let labels = samples.iter().flat_map(|sample| &sample.labels);
        let (rows, labels): (Vec<u32>, Vec<u32>) =
            (0u32..).zip(labels.copied()).filter(|(_, label)| *label != IGNORED).unzip();
        let context = batch.max_blocks * self.cache.kv.block_size();
        let pass = match self.pass.take().filter(|pass| pass.fits(batch.tokens, rows.len(), context)) {
            Some(pass) => pass,
            None => TrainingPass::new(
                &queue,
                &decoder.config,
                decoder.precision,
                batch.tokens,
                rows.len(),
                context,
                self.recompute,
            )?,
        };
        let pages = self.cache.kv.layers();
        if let Learns::Adapters(lora) = &mut self.learns {
            lora.begin(&queue, batch.tokens)?;
        }
        let learned = match &self.learns {
            Learns::Weights(grads) => Learned::Weights(grads),
            Learns::Adapters(lora) => Learned::Adapters(lora, learn.map(|(update, _)| update)),
        };
        pass.forward(&queue, &decoder, &batch, pages, learned)?;
        let forward = queue.record();
        let scale = learn.map_or(0.0, |(_, scale)| scale) / labels.len().max(1) as f32;
        let labels = Labels { rows: &rows, labels: &labels, scale };
        let losses = pass.loss(&queue, &decoder, batch.tokens, labels, learned, learn.is_some())?;
        let judged = queue.record();
        if learn.is_some() {
            let dkv = match self.gradients.take().filter(|dkv| dkv.blocks() == pages[0].blocks()) {
                Some(dkv) => dkv,
                None => gradient_pages(queue.backend(), &pages[0])?,
            };
            let zeroed = |_| {
                ops::zero(&queue, &dkv.keys)?;
                ops::zero(&queue, &dkv.values)?;
                Ok(dkv.clone())
            };
            pass.backward(&queue, &decoder, &batch, pages, learned, 0, zeroed, |_| Ok(()))?;
            if let Learned::Adapters(lora, _) = learned {
                lora.finish(&queue)?;
            }
            self.gradients = Some(dkv);
        }
        self.pass = Some(pass);
        let end = queue.record();
        queue.synchronize()?;
        let spent = |to: &Event, from: &Event| to.elapsed_since(from).unwrap_or_default();
        let mut report = BatchReport {
            loss: losses.iter().map(|&loss| f64::from(loss)).sum::<f64>() / losses.len().max(1) as f64,
            labels: losses.len(),
            receiver_tokens: lengths.iter().sum(),
            ..BatchReport::default()
        };
        report.phases.receiver = spent(&forward, &begin);
        report.phases.loss = spent(&judged, &forward);
        report.phases.backward = spent(&end, &judged);
        Ok(report)
    }

    /// The first layer whose output over the last batch is not finite.
    pub fn first_bad_layer(&self, queue: &Queue) -> Result<Option<usize>, Error> {
        let tokens = self.cache.slots.iter().map(Vec::len).sum();
        self.pass.as_ref().map_or(Ok(None), |pass| pass.first_bad_layer(queue, tokens))
    }

    /// Writes what has learned into `folder`: all weights as `model.safetensors` in bf16, with transformers' names, or adapters in PEFT's
    /// files, which name `base` as their model.
    pub fn save(&self, folder: &Path, base: &str) -> Result<(), Error> {
        if let Some(lora) = self.lora() {
            let config = &self.decoder.config;
            let adapter = lora.snapshot(&self.queue, &self.parameters, config, base)?;
            return Ok(adapter.write(folder, config)?);
        }
        let tensors = self.parameters.entries().iter().enumerate().map(|(index, entry)| OutgoingTensor {
            name: entry.name.clone(),
            dtype: Dtype::BF16,
            shape: entry.shape.clone(),
            bytes: Box::new(move || {
                let values = self.queue.download_f32(&self.parameters.view(Kept::Weights, index))?;
                Ok::<_, Error>(values.iter().flat_map(|&x| half::bf16::from_f32(x).to_le_bytes()).collect())
            }),
        });
        let tensors: Vec<OutgoingTensor<Error>> = tensors.collect();
        write_safetensors(&folder.join("model.safetensors"), &[("format", "pt")], &tensors)
    }
}
