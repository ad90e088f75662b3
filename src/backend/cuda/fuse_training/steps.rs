//! The launches of the fuser in training as they are written down, one after the other.

use super::super::{
    Launch, dtype_code,
    fuse::{FuseColumns, NORM_EPS},
    linear_backward::SIDE,
    norm_backward,
};
use super::{
    Block, FuseOperand, FuseTrainingArgs, Half, Linear, Plan, Rows, Which, Work, operands_each, saved_half,
};
use crate::{
    backend::{DType, Precision, Tensor},
    ops::{FuseExtent, FuseOperands, FuseTrainingParams, Projector, Weight},
};

/// The launches so far, and each problem's operands.
pub(super) struct Steps<'a> {
    pub(super) p: FuseTrainingParams,
    pub(super) halves: Vec<Half<'a>>,
    pub(super) lists: Vec<Vec<FuseOperand>>,
    pub(super) launches: Vec<(Launch, FuseTrainingArgs)>,
    /// What all launches have in common.
    pub(super) args: FuseTrainingArgs,
    /// F32 elements that are given away of a problem's kept memory and scratch.
    pub(super) saved: usize,
    pub(super) scratch: usize,
}

impl<'a> Steps<'a> {
    pub(super) fn new(p: FuseTrainingParams, halves: Vec<Half<'a>>, o: &FuseOperands) -> Steps<'a> {
        let lists = halves
            .iter()
            .map(|half| vec![FuseOperand { part: half.part, ..FuseOperand::default() }])
            .collect();
        let args = FuseTrainingArgs {
            operands: o.scratch.address(),
            tokens: p.fuse.tokens,
            seed: [p.seed as u32, (p.seed >> 32) as u32],
            step: p.step,
            eps: NORM_EPS,
            replaces_target: u32::from(!p.fuse.use_target),
            ..FuseTrainingArgs::default()
        };
        Steps { p, halves, lists, launches: Vec::new(), args, saved: 0, scratch: 0 }
    }

    /// A new operand, of each problem that one.
    pub(super) fn operand(&mut self, of: impl Fn(&Half<'a>) -> (u64, DType)) -> u32 {
        for (list, half) in self.lists.iter_mut().zip(&self.halves) {
            let (data, dtype) = of(half);
            list.push(FuseOperand { data, dtype: dtype_code(dtype), part: 0 });
        }
        self.lists[0].len() as u32 - 1
    }

    pub(super) fn tensor(&mut self, of: impl Fn(&Half<'a>) -> Option<&'a Tensor>) -> u32 {
        if of(&self.halves[0]).is_none() {
            return 0;
        }
        let place = |tensor: &Tensor| (tensor.address(), tensor.dtype());
        self.operand(|half| of(half).map_or((0, DType::F32), place))
    }

    pub(super) fn tokens(&self) -> usize {
        self.p.fuse.tokens as usize
    }

    /// Rows of `width` elements in the kept memory.
    pub(super) fn saved(&mut self, width: usize) -> Rows {
        let at = self.saved as u64 * 4;
        self.saved += self.tokens() * width;
        Rows { operand: self.operand(|half| (half.saved + at, DType::F32)), stride: width as u32 }
    }

    /// The same rows from a column on.
    pub(super) fn columns_from(&mut self, rows: Rows, column: usize) -> Rows {
        let starts: Vec<u64> = self.lists.iter().map(|list| list[rows.operand as usize].data).collect();
        for (list, start) in self.lists.iter_mut().zip(starts) {
            list.push(FuseOperand {
                data: start + 4 * column as u64,
                dtype: dtype_code(DType::F32),
                part: 0,
            });
        }
        Rows { operand: self.lists[0].len() as u32 - 1, ..rows }
    }

    /// Rows of `width` elements of scratch.
    pub(super) fn scratch(&mut self, width: usize) -> Rows {
        let elements = self.tokens() * width;
        Rows { operand: self.scratch_elements(elements), stride: width as u32 }
    }

    /// Partial sums of the weight of a norm of up to `width` elements.
    pub(super) fn partials(&mut self, width: usize) -> u32 {
        let rows = norm_backward::blocks(self.p.fuse.tokens) as usize;
        self.scratch_elements(rows * width)
    }

    pub(super) fn scratch_elements(&mut self, elements: usize) -> u32 {
        let at = self.scratch as u64 * 4;
        self.scratch += elements;
        self.operand(|half| (half.scratch + at, DType::F32))
    }

    pub(super) fn linear(&mut self, of: impl Fn(&Projector) -> &Weight) -> Linear {
        let part = |p: &'a Projector| &of(p).parts[0];
        let first = of(self.halves[0].projector);
        let (rows, cols) = (first.rows() as u32, first.cols() as u32);
        Linear {
            weight: self.tensor(|half| Some(&part(half.projector).matrix)),
            bias: self.tensor(|half| part(half.projector).bias.as_ref()),
            grad: self.tensor(|half| half.grad.map(|grad| &part(grad).matrix)),
            bias_grad: self.tensor(|half| half.grad.and_then(|grad| part(grad).bias.as_ref())),
            rows,
            cols,
        }
    }

    pub(super) fn launch(
        &mut self,
        kernel: &'static str,
        grid: (u32, u32),
        block: u32,
        args: FuseTrainingArgs,
    ) {
        let grid = (grid.0, grid.1, self.halves.len() as u32);
        self.launches.push((Launch { kernel, grid, block, shared: 0 }, args));
    }

    pub(super) fn by_token(&mut self, kernel: &'static str, args: FuseTrainingArgs) {
        self.launch(kernel, (self.p.fuse.tokens, 1), 128, args);
    }

    /// A product with `m` by `n` sums, in bf16 or in f32.
    pub(super) fn sums(&mut self, kernels: [&'static str; 2], m: u32, n: u32, args: FuseTrainingArgs) {
        let (kernel, block) = match self.p.fuse.precision {
            Precision::Fast => (kernels[0], 128),
            Precision::F32 => (kernels[1], 256),
        };
        self.launch(kernel, (m.div_ceil(SIDE), n.div_ceil(SIDE)), block, args);
    }

    pub(super) fn gather(&mut self, pages: u32, columns: FuseColumns, out: Rows) {
        let args =
            FuseTrainingArgs { x: pages, columns, out: out.operand, out_stride: out.stride, ..self.args };
        self.by_token("fuse_training_gather", args);
    }

    /// `out = x · Wᵀ + b`
    pub(super) fn product(&mut self, linear: &Linear, x: Rows, out: Rows) {
        self.finished_product(linear, x, out, self.args);
    }

    /// The same with what the arguments say of x and of the result.
    pub(super) fn finished_product(&mut self, linear: &Linear, x: Rows, out: Rows, args: FuseTrainingArgs) {
        let args = FuseTrainingArgs {
            x: x.operand,
            x_stride: x.stride,
            weight: linear.weight,
            bias: linear.bias,
            out: out.operand,
            out_stride: out.stride,
            rows: linear.rows,
            cols: linear.cols,
            ..args
        };
        let kernels = ["fuse_training_linear_bf16", "fuse_training_linear_f32"];
        self.sums(kernels, self.p.fuse.tokens, linear.rows, args);
    }

    /// With what an FFN block drops.
    pub(super) fn dropping(&self, which: Which) -> FuseTrainingArgs {
        let dropout = self.p.dropout;
        FuseTrainingArgs { dropout, kept: 1.0 / (1.0 - dropout), block: which.number(), ..self.args }
    }

    pub(super) fn norm(&mut self, which: Which, x: Rows, out: Rows) -> u32 {
        let weight = self.tensor(|half| Some(&which.of(half.projector).norm));
        let args = FuseTrainingArgs { x: x.operand, weight, out: out.operand, cols: x.stride, ..self.args };
        self.by_token("fuse_training_norm", args);
        weight
    }

    /// `y = x + drop(W2 · gelu(W1 · norm(x)))`
    pub(super) fn ffn(&mut self, which: Which, x: Rows, block: Block, normed: Rows) {
        let (w1, w2) = (self.linear(|p| &which.of(p).w1), self.linear(|p| &which.of(p).w2));
        let normed = Rows { stride: w1.cols, ..normed };
        self.norm(which, x, normed);
        self.product(&w1, normed, block.u);
        let args = FuseTrainingArgs { gelu: 1, y: x.operand, y_stride: x.stride, ..self.dropping(which) };
        self.finished_product(&w2, block.u, block.y, args);
    }

    /// Of `y = x · Wᵀ + b`: adds to the gradients of the weights, and assigns that of x.
    pub(super) fn product_backward(&mut self, linear: &Linear, x: Rows, dy: Rows, dx: Option<Rows>) {
        self.weights_backward(linear, x, dy, false);
        if let Some(dx) = dx {
            self.input_backward(linear, dy, dx, 0);
        }
    }

    pub(super) fn weights_backward(&mut self, linear: &Linear, x: Rows, dy: Rows, gelu: bool) {
        let args = FuseTrainingArgs {
            x: x.operand,
            x_stride: x.stride,
            y: dy.operand,
            y_stride: dy.stride,
            out: linear.grad,
            gelu: gelu.into(),
            rows: linear.rows,
            cols: linear.cols,
            ..self.args
        };
        self.sums(["fuse_training_weight_bf16", "fuse_training_weight_f32"], linear.rows, linear.cols, args);
        if linear.bias_grad > 0 {
            self.sum(dy.operand, self.p.fuse.tokens, dy.stride, linear.bias_grad, linear.rows);
        }
    }

    /// `u`: what a GELU that made x has read, 0 where there is none.
    pub(super) fn input_backward(&mut self, linear: &Linear, dy: Rows, dx: Rows, u: u32) {
        let args = FuseTrainingArgs {
            y: dy.operand,
            y_stride: dy.stride,
            weight: linear.weight,
            extra: u,
            out: dx.operand,
            out_stride: dx.stride,
            rows: linear.rows,
            cols: linear.cols,
            ..self.args
        };
        let kernels = ["fuse_training_input_bf16", "fuse_training_input_f32"];
        self.sums(kernels, self.p.fuse.tokens, linear.cols, args);
    }

    /// Adds `rows` rows of x to `out`.
    pub(super) fn sum(&mut self, x: u32, rows: u32, stride: u32, out: u32, cols: u32) {
        let args = FuseTrainingArgs { x, x_stride: stride, out, rows, cols, ..self.args };
        self.launch("fuse_training_sum", (cols.div_ceil(32), 1), 512, args);
    }

    /// `dz`: the gradient of y in, of x out.
    pub(super) fn ffn_backward(&mut self, which: Which, x: Rows, u: Rows, dz: Rows, work: &Work) {
        let (w1, w2) = (self.linear(|p| &which.of(p).w1), self.linear(|p| &which.of(p).w2));
        let cols = w1.cols;
        let [branch, normed] = [work.branch, work.normed].map(|rows| Rows { stride: cols, ..rows });
        let dinner = Rows { stride: w1.rows, ..work.dinner };
        let mut dy = dz;
        if self.p.dropout > 0.0 {
            let args = FuseTrainingArgs { x: dz.operand, out: branch.operand, cols, ..self.dropping(which) };
            self.by_token("fuse_training_drop", args);
            dy = branch;
        }
        self.weights_backward(&w2, u, dy, true);
        self.input_backward(&w2, dy, dinner, u.operand);
        let weight = self.norm(which, x, normed);
        self.product_backward(&w1, normed, dinner, Some(branch));
        let args = FuseTrainingArgs {
            x: x.operand,
            y: branch.operand,
            weight,
            out: dz.operand,
            extra: work.partials,
            cols,
            ..self.args
        };
        let blocks = norm_backward::blocks(self.p.fuse.tokens);
        self.launch("fuse_training_norm_backward", (blocks, 1), 256, args);
        let grad = self.tensor(|half| half.grad.map(|grad| &which.of(grad).norm));
        self.sum(work.partials, blocks, cols, grad, cols);
    }

    pub(super) fn plan(mut self, e: &FuseExtent) -> Plan {
        let each = self.lists[0].len();
        let given = (self.saved, self.scratch);
        assert!(
            each <= operands_each(e) && given.0 <= saved_half(e),
            "fuse: {each} operands, {given:?} elements"
        );
        self.launches.iter_mut().for_each(|(_, args)| args.operands_each = each as u32);
        Plan { table: bytemuck::cast_slice(&self.lists.concat()).to_vec(), launches: self.launches }
    }
}
