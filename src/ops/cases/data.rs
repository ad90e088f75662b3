//! Operands of cases: the same numbers on every device, between slack that nothing may write or use.

use super::{Error, Run};
use crate::{
    backend::{DType, Precision, Queue, Tensor},
    ops::{KvPages, Scratch, Weight, WeightPart, embed},
    rng::{Purpose, Rng, Stream},
};
use half::{bf16, f16};

/// Elements of slack before and after an operand: keeps the operand at 256 bytes.
const SLACK: usize = 128;
/// Far larger than the others, one in this many: as activations and caches of real models have them.
const OUTLIER_EVERY: usize = 97;

/// An output.
#[derive(Clone, Debug)]
pub struct Made {
    pub name: String,
    pub values: Vec<f32>,
}

/// Elements `[slack | operand | slack]`.
struct Output {
    name: String,
    whole: Tensor,
    /// Of each row of the operand, the first so many elements are compared.
    columns: usize,
    row: usize,
    /// Rounded by a plain implementation in bf16.
    activation: bool,
    /// Operands in pages: which rows of `row` elements the op writes or keeps; others stay NaN.
    rows: Option<Vec<usize>>,
}

pub(super) struct Data {
    pub queue: Queue,
    run: Run,
    made: u32,
    outputs: Vec<Output>,
}

fn to_bytes(values: &[f32], dtype: DType) -> Vec<u8> {
    match dtype {
        DType::Bf16 => values.iter().flat_map(|&x| bf16::from_f32(x).to_le_bytes()).collect(),
        DType::F16 => values.iter().flat_map(|&x| f16::from_f32(x).to_le_bytes()).collect(),
        _ => values.iter().flat_map(|x| x.to_le_bytes()).collect(),
    }
}

impl Data {
    pub fn new(queue: &Queue, run: Run) -> Data {
        Data { queue: queue.clone(), run, made: 0, outputs: Vec::new() }
    }

    fn uniform(&mut self, n: usize) -> Vec<f32> {
        self.made += 1;
        let mut numbers = vec![0.0; n];
        Rng::new(20_251_003, Stream::new(Purpose::Init, self.made), 0).fill_uniform(0, &mut numbers);
        numbers
    }

    /// Uniform in ±1 but for the outliers.
    fn numbers(&mut self, n: usize) -> Vec<f32> {
        let spread = |(i, u): (usize, f32)| (2.0 * u - 1.0) * if i % OUTLIER_EVERY == 5 { 8.0 } else { 1.0 };
        self.uniform(n).into_iter().enumerate().map(spread).collect()
    }

    fn activation(&self) -> DType {
        self.queue.backend().activation_dtype(self.run.precision)
    }

    fn page_dtype(&self) -> DType {
        if self.run.rounded || self.run.precision == Precision::Fast { DType::Bf16 } else { DType::F32 }
    }

    /// A tensor between slack, all of it `bytes`.
    fn place(&mut self, dtype: DType, values: &[f32], dims: &[usize]) -> Result<(Tensor, Tensor), Error> {
        let whole = values.len() + 2 * SLACK;
        let mut padded = vec![f32::NAN; whole];
        padded[SLACK..SLACK + values.len()].copy_from_slice(values);
        let whole = self.queue.backend().alloc(dtype, &[whole], "a case")?;
        self.queue.backend().upload(self.queue.id(), &to_bytes(&padded, dtype), &whole);
        let view = whole.narrow(SLACK, values.len()).and_then(|view| view.reshape(dims));
        Ok((view.expect("as many elements as dimensions say"), whole))
    }

    fn rounded(&self, mut values: Vec<f32>) -> Vec<f32> {
        if self.run.rounded {
            values.iter_mut().for_each(|x| *x = bf16::from_f32(*x).to_f32());
        }
        values
    }

    /// F32 input, never rounded.
    pub fn float(&mut self, dims: &[usize]) -> Result<Tensor, Error> {
        let values = self.numbers(dims.iter().product());
        Ok(self.place(DType::F32, &values, dims)?.0)
    }

    /// F32 gradient of activations, which a plain implementation in bf16 would be given rounded.
    pub fn gradient(&mut self, dims: &[usize]) -> Result<Tensor, Error> {
        let values = self.numbers(dims.iter().product());
        let values = self.rounded(values);
        Ok(self.place(DType::F32, &values, dims)?.0)
    }

    /// Input in the device's dtype of activations.
    pub fn activations(&mut self, dims: &[usize]) -> Result<Tensor, Error> {
        let values = self.numbers(dims.iter().product());
        let values = self.rounded(values);
        Ok(self.place(self.activation(), &values, dims)?.0)
    }

    /// Around 1.
    pub fn vector(&mut self, dtype: DType, len: usize) -> Result<Tensor, Error> {
        let values: Vec<f32> = self.uniform(len).into_iter().map(|u| 0.5 + u).collect();
        Ok(self.place(dtype, &values, &[len])?.0)
    }

    pub fn indices(&mut self, values: &[u32]) -> Result<Tensor, Error> {
        Ok(self.queue.tensor(values, &[values.len()], "a case")?)
    }

    /// NaN, at least as long as the device asks for.
    pub fn scratch(&mut self, need: Scratch) -> Result<Tensor, Error> {
        let len = self.queue.backend().scratch_len(need);
        let (view, whole) = self.place(DType::F32, &vec![f32::NAN; len], &[len])?;
        let (name, row) = ("scratch".into(), len.max(1));
        self.outputs.push(Output { name, whole, columns: 0, row, activation: false, rows: None });
        Ok(view)
    }

    /// An output, NaN until written: activations, or F32.
    pub fn output(&mut self, name: &str, activation: bool, dims: &[usize]) -> Result<Tensor, Error> {
        let values = vec![f32::NAN; dims.iter().product()];
        self.keep(name, activation, &values, dims, dims[dims.len() - 1])
    }

    /// F32 that is added to or changed in place.
    pub fn accumulator(&mut self, name: &str, dims: &[usize]) -> Result<Tensor, Error> {
        let values = self.numbers(dims.iter().product());
        self.keep(name, false, &values, dims, dims[dims.len() - 1])
    }

    /// F32 that is changed in place and not negative.
    pub fn squares(&mut self, name: &str, len: usize) -> Result<Tensor, Error> {
        let values: Vec<f32> = self.numbers(len).into_iter().map(|x| 1e-3 * x * x).collect();
        self.keep(name, false, &values, &[len], len)
    }

    /// Activations of which the first `columns` of each row are changed in place, and the others not compared.
    pub fn in_place(&mut self, name: &str, dims: &[usize], columns: usize) -> Result<Tensor, Error> {
        let values = self.numbers(dims.iter().product());
        let values = self.rounded(values);
        self.keep(name, true, &values, dims, columns)
    }

    fn keep(
        &mut self,
        name: &str,
        activation: bool,
        values: &[f32],
        dims: &[usize],
        columns: usize,
    ) -> Result<Tensor, Error> {
        let dtype = if activation { self.activation() } else { DType::F32 };
        let (view, whole) = self.place(dtype, values, dims)?;
        let (name, row) = (name.into(), dims[dims.len() - 1]);
        self.outputs.push(Output { name, whole, columns, row, activation, rows: None });
        Ok(view)
    }

    /// [`Data::matrix`], rounded to bf16 where the run is, embedding tables apart.
    fn matrix_of_products(&mut self, dtype: DType, rows: usize, cols: usize) -> Result<Tensor, Error> {
        let stored = self.matrix(dtype, rows, cols)?;
        if !self.run.rounded || dtype == DType::Bf16 {
            return Ok(stored);
        }
        // Looking every row up expands it.
        let ids: Vec<u32> = (0..rows as u32).collect();
        let ids = self.queue.tensor(&ids, &[rows], "a case")?;
        let out = self.queue.backend().alloc(DType::F32, &[rows, cols], "a case")?;
        embed(&self.queue, &ids, &stored, 1.0, &out)?;
        let values = self.rounded(self.queue.download_f32(&out)?);
        Ok(self.queue.tensor(&values, &[rows, cols], "a case")?)
    }

    /// Random bytes with scales of which the product of a row with its input comes out at about the size of the input.
    pub fn matrix(&mut self, dtype: DType, rows: usize, cols: usize) -> Result<Tensor, Error> {
        let bound = (3.0 / cols as f32).sqrt();
        if !dtype.is_quantized() {
            let values: Vec<f32> =
                self.uniform(rows * cols).into_iter().map(|u| (2.0 * u - 1.0) * bound).collect();
            return Ok(self.place(dtype, &values, &[rows, cols])?.0);
        }
        let blocks = rows * cols / dtype.block_len();
        let mut bytes: Vec<u8> =
            self.uniform(blocks * dtype.block_bytes()).into_iter().map(|u| (u * 256.0) as u8).collect();
        // Where a block's f16 factors stand, and the largest level that each multiplies.
        let factors: &[(usize, f32)] = match dtype {
            DType::Q4_0 => &[(0, 8.0)],
            DType::Q4_1 => &[(0, 15.0), (2, 2.0)],
            DType::Q5_0 => &[(0, 16.0)],
            DType::Q5_1 => &[(0, 31.0), (2, 2.0)],
            DType::Q8_0 | DType::Iq4Nl => &[(0, 127.0)],
            DType::Q2K => &[(80, 45.0), (82, 15.0)],
            DType::Q3K => &[(108, 128.0)],
            DType::Q4K | DType::Q5K => &[(0, 63.0 * 31.0), (2, 63.0)],
            DType::Q6K => &[(208, 127.0 * 32.0)],
            other => unreachable!("{other} has no blocks"),
        };
        let sizes = self.uniform(blocks);
        for (block, size) in bytes.chunks_exact_mut(dtype.block_bytes()).zip(sizes) {
            for &(at, level) in factors {
                let factor = f16::from_f32(bound * (0.5 + size) / level);
                block[at..at + 2].copy_from_slice(&factor.to_le_bytes());
            }
        }
        let tensor = self.queue.backend().alloc(dtype, &[rows, cols], "a case")?;
        self.queue.backend().upload(self.queue.id(), &bytes, &tensor);
        Ok(tensor)
    }

    pub fn weight(
        &mut self,
        parts: &[(DType, usize)],
        cols: usize,
        bias: Option<DType>,
    ) -> Result<Weight, Error> {
        let part = |&(dtype, rows): &(DType, usize)| {
            let matrix = self.matrix_of_products(dtype, rows, cols)?;
            Ok(WeightPart { matrix, bias: bias.map(|dtype| self.vector(dtype, rows)).transpose()? })
        };
        Ok(Weight { parts: parts.iter().map(part).collect::<Result<_, Error>>()? })
    }

    /// Cosines and sines of positions that jump.
    pub fn angles(&mut self, tokens: usize, head_dim: usize) -> Result<Tensor, Error> {
        let half = head_dim / 2;
        let mut table = Vec::new();
        for token in 0..tokens {
            let position = (token * 37 % 101) as f32;
            let angle = |i: usize| position * 1e4f32.powf(-(i as f32) / half as f32);
            table.extend((0..half).map(|i| angle(i).cos()));
            table.extend((0..half).map(|i| angle(i).sin()));
        }
        Ok(self.place(DType::F32, &table, &[tokens, head_dim])?.0)
    }

    /// Slots of `tokens` tokens in blocks that lie in another order, with blocks of no one between.
    pub fn slots(&mut self, tokens: usize, block_size: usize) -> Vec<u32> {
        self.made += 1;
        let blocks = tokens.div_ceil(block_size).max(1);
        let order = shuffled(blocks + 2, self.made);
        (0..tokens).map(|t| order[t / block_size] * block_size as u32 + (t % block_size) as u32).collect()
    }

    /// Block tables, their width, and the slots of all keys.
    pub fn tables(&mut self, sequences: &[(usize, usize)], block_size: usize) -> (Vec<u32>, usize, Vec<u32>) {
        let needed = |context: usize| context.div_ceil(block_size);
        let total: usize = sequences.iter().map(|s| needed(s.1)).sum();
        let max_blocks = sequences.iter().map(|s| needed(s.1)).max().unwrap_or(1) + 1;
        self.made += 1;
        let mut order = shuffled(total + 2, self.made).into_iter();
        let (mut tables, mut slots) = (Vec::new(), Vec::new());
        for &(_, context) in sequences {
            let blocks: Vec<u32> = order.by_ref().take(needed(context)).collect();
            let slot = |t: usize| blocks[t / block_size] * block_size as u32 + (t % block_size) as u32;
            slots.extend((0..context).map(slot));
            tables.extend(&blocks);
            // Entries past a sequence's blocks name no block.
            tables.resize(tables.len() + max_blocks - blocks.len(), u32::MAX);
        }
        (tables, max_blocks, slots)
    }

    /// Keys and values at `slots`, NaN elsewhere.
    pub fn pages(
        &mut self,
        slots: &[u32],
        kv_heads: usize,
        head_dim: usize,
        block_size: usize,
    ) -> Result<KvPages, Error> {
        self.read_pages(self.page_dtype(), slots, kv_heads, head_dim, block_size)
    }

    /// The same in F32: gradients.
    pub fn float_pages(
        &mut self,
        slots: &[u32],
        kv_heads: usize,
        head_dim: usize,
        block_size: usize,
    ) -> Result<KvPages, Error> {
        self.read_pages(DType::F32, slots, kv_heads, head_dim, block_size)
    }

    fn read_pages(
        &mut self,
        dtype: DType,
        slots: &[u32],
        kv_heads: usize,
        head_dim: usize,
        block_size: usize,
    ) -> Result<KvPages, Error> {
        let mut half = || {
            let (values, dims, _) = self.page_values(slots, kv_heads, head_dim, block_size, true);
            Ok::<Tensor, Error>(self.place(dtype, &values, &dims)?.0)
        };
        Ok(KvPages { keys: half()?, values: half()? })
    }

    /// Pages that an op writes at `slots`; all NaN before.
    pub fn pages_out(
        &mut self,
        name: &str,
        slots: &[u32],
        kv_heads: usize,
        head_dim: usize,
        block_size: usize,
    ) -> Result<KvPages, Error> {
        self.kept_pages(name, self.page_dtype(), slots, [kv_heads, head_dim, block_size], false)
    }

    /// Pages that an op changes at `slots`.
    pub fn pages_in_out(
        &mut self,
        name: &str,
        slots: &[u32],
        kv_heads: usize,
        head_dim: usize,
        block_size: usize,
    ) -> Result<KvPages, Error> {
        self.kept_pages(name, self.page_dtype(), slots, [kv_heads, head_dim, block_size], true)
    }

    /// The same in F32: gradients that are added to.
    pub fn float_pages_in_out(
        &mut self,
        name: &str,
        slots: &[u32],
        kv_heads: usize,
        head_dim: usize,
        block_size: usize,
    ) -> Result<KvPages, Error> {
        self.kept_pages(name, DType::F32, slots, [kv_heads, head_dim, block_size], true)
    }

    fn kept_pages(
        &mut self,
        name: &str,
        dtype: DType,
        slots: &[u32],
        [kv_heads, head_dim, block_size]: [usize; 3],
        filled: bool,
    ) -> Result<KvPages, Error> {
        let mut half = |half: &str| {
            let (values, dims, rows) = self.page_values(slots, kv_heads, head_dim, block_size, filled);
            let (view, whole) = self.place(dtype, &values, &dims)?;
            let name = format!("{name}, {half}");
            let (columns, row, rows) = (head_dim, head_dim, Some(rows));
            self.outputs.push(Output { name, whole, columns, row, activation: false, rows });
            Ok::<Tensor, Error>(view)
        };
        Ok(KvPages { keys: half("keys")?, values: half("values")? })
    }

    /// All elements of pages, their dimensions, and the rows (of `head_dim`) that belong to `slots`.
    fn page_values(
        &mut self,
        slots: &[u32],
        kv_heads: usize,
        head_dim: usize,
        block_size: usize,
        filled: bool,
    ) -> (Vec<f32>, [usize; 4], Vec<usize>) {
        let blocks = slots.iter().max().map_or(0, |&last| last as usize / block_size) + 1;
        let mut values = vec![f32::NAN; blocks * kv_heads * block_size * head_dim];
        let mut rows = Vec::new();
        for &slot in slots {
            let (block, offset) = (slot as usize / block_size, slot as usize % block_size);
            rows.extend((0..kv_heads).map(|head| (block * kv_heads + head) * block_size + offset));
        }
        if filled {
            let numbers = self.numbers(rows.len() * head_dim);
            for (&row, numbers) in rows.iter().zip(numbers.chunks_exact(head_dim)) {
                values[row * head_dim..][..head_dim].copy_from_slice(numbers);
            }
        }
        (values, [blocks, kv_heads, block_size, head_dim], rows)
    }

    /// Reads all outputs, and looks at what lies around them.
    pub fn outputs(self) -> Result<Vec<Made>, Error> {
        let mut all = Vec::new();
        for output in &self.outputs {
            let whole = self.queue.download_f32(&output.whole)?;
            let (before, rest) = whole.split_at(SLACK);
            let (operand, after) = rest.split_at(rest.len() - SLACK);
            let untouched = |part: &[f32]| part.iter().all(|x| x.is_nan());
            if !untouched(before) || !untouched(after) {
                return Err(Error::Slack(output.name.clone()));
            }
            let rows = operand.chunks_exact(output.row);
            let values: Vec<f32> = match &output.rows {
                None if output.columns == 0 => continue,
                None => rows.flat_map(|row| &row[..output.columns]).copied().collect(),
                Some(written) => {
                    let mut others = vec![true; rows.len()];
                    written.iter().for_each(|&row| others[row] = false);
                    if rows.clone().zip(&others).any(|(row, &other)| other && !untouched(row)) {
                        return Err(Error::Slack(output.name.clone()));
                    }
                    written
                        .iter()
                        .flat_map(|&row| &operand[row * output.row..][..output.row])
                        .copied()
                        .collect()
                }
            };
            let values = if output.activation { self.rounded(values) } else { values };
            all.push(Made { name: output.name.clone(), values });
        }
        Ok(all)
    }
}

/// `0..n` in another order.
fn shuffled(n: usize, seed: u32) -> Vec<u32> {
    let rng = Rng::new(7, Stream::new(Purpose::Shuffle, seed), 0);
    let mut order: Vec<u32> = (0..n as u32).collect();
    for i in (1..n).rev() {
        order.swap(i, (rng.bits(i as u32) as usize) % (i + 1));
    }
    order
}
