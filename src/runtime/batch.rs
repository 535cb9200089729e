//! A batch: which sequences advance in a step, by how much, and how their rows are packed.

use super::sampling::Sampling;
use super::sequence::Sequence;
use crate::error::Result;
use crate::graph::Executor;
use crate::model::llama::Llama;
use crate::op::SampleParams;
use crate::tensor::Bindings;
use std::ops::Range;

/// What a step computes for a sequence, beyond filling its cache.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Want {
    /// Nothing: this is a chunk in the middle of a prompt.
    Nothing,
    /// The logits of the last row, and the token chosen from them.
    Next,
    /// The logits of every row, and the token chosen from the last.
    All,
}

/// Which family of kernels computes the rows of an [`Advance`], where a device has two: one for many rows,
/// one for few. On such a device a row's bits depend on its phase, and on nothing else; on the CPU not even on that.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Phase {
    /// Rows of given text: prompts, and continuations to be scored.
    Prefill,
    /// Rows of tokens that the model chose.
    Decode,
}

/// A sequence's part in a step.
#[derive(Debug)]
pub struct Advance<'a> {
    /// The sequence.
    pub sequence: &'a mut Sequence,
    /// How many of its pending ids to process, at least one.
    pub tokens: usize,
    /// What to compute.
    pub want: Want,
    /// Whether the ids were given or chosen. A step may mix both.
    pub phase: Phase,
}

impl Advance<'_> {
    /// Rows of logits it asks for.
    pub(super) fn outputs(&self) -> usize {
        match self.want {
            Want::Nothing => 0,
            Want::Next => 1,
            Want::All => self.tokens,
        }
    }
}

/// The rows of a step on their way to the device. Capacities are for the largest step.
#[derive(Default)]
pub(super) struct Staging {
    ids: Vec<i32>,
    sources: Vec<i32>,
    positions: Vec<i32>,
    slots: Vec<i32>,
    table_starts: Vec<i32>,
    tables: Vec<i32>,
    select: Vec<i32>,
    params: Vec<SampleParams>,
    /// Tokens chosen in the last step, one for each output row.
    pub next: Vec<i32>,
    /// For each sequence of the last step: its rows.
    rows: Vec<Range<usize>>,
    /// For each sequence of the last step: its output rows.
    pub outputs: Vec<Range<usize>>,
    /// Row counts of the last step.
    pub bindings: Bindings,
}

impl Staging {
    /// Room for steps up to `max`.
    pub fn with_capacity(max: &Bindings, sequences: usize) -> Self {
        Staging {
            ids: Vec::with_capacity(max.tokens),
            sources: Vec::with_capacity(max.tokens),
            positions: Vec::with_capacity(max.tokens),
            slots: Vec::with_capacity(max.tokens),
            table_starts: Vec::with_capacity(max.tokens),
            tables: Vec::with_capacity(max.table_entries),
            select: Vec::with_capacity(max.outputs),
            params: Vec::with_capacity(max.outputs),
            next: vec![0; max.outputs],
            rows: Vec::with_capacity(sequences),
            outputs: Vec::with_capacity(sequences),
            bindings: Bindings::default(),
        }
    }

    fn clear(&mut self) {
        self.ids.clear();
        self.sources.clear();
        self.positions.clear();
        self.slots.clear();
        self.table_starts.clear();
        self.tables.clear();
        self.select.clear();
        self.params.clear();
        self.rows.clear();
        self.outputs.clear();
    }

    /// Packs the rows of the step, those of decode first, and writes them to the device.
    pub fn stage(&mut self, batch: &[Advance<'_>], language: &mut Executor, llama: &Llama) -> Result<()> {
        self.clear();
        self.rows.resize(batch.len(), 0..0);
        self.outputs.resize(batch.len(), 0..0);
        self.pack_all(batch, Phase::Decode);
        let (decode, decode_outputs) = (self.ids.len(), self.select.len());
        self.pack_all(batch, Phase::Prefill);
        self.bindings = Bindings {
            tokens: self.ids.len(),
            decode,
            outputs: self.select.len(),
            decode_outputs,
            table_entries: self.tables.len(),
            images: 0,
            ..language.plan().max
        };
        self.write(batch, language, llama)
    }

    fn pack_all(&mut self, batch: &[Advance<'_>], phase: Phase) {
        for (i, a) in batch.iter().enumerate().filter(|(_, a)| a.phase == phase) {
            self.pack(i, a);
        }
    }

    /// Appends the rows of the i-th sequence.
    fn pack(&mut self, i: usize, a: &Advance<'_>) {
        let (sequence, end) = (&a.sequence, a.sequence.table.len());
        let start = self.tables.len() as i32;
        self.tables.extend(sequence.table.pages().iter().map(|&p| p as i32));
        for position in end - a.tokens..end {
            let row = self.ids.len();
            self.ids.push(sequence.ids[position] as i32);
            self.positions.push(position as i32);
            self.slots.push(sequence.table.slot(position) as i32);
            self.table_starts.push(start);
            self.sources.push(if sequence.image_at(position).is_some() { row as i32 } else { -1 });
        }
        let (rows, first) = (self.ids.len(), self.select.len());
        self.rows[i] = rows - a.tokens..rows;
        for row in rows - a.outputs()..rows {
            // Only the last row's token is of interest; greedy is the cheapest way to skip the rest.
            let sampling = if row + 1 == rows { sequence.sampling } else { Sampling::GREEDY };
            self.select.push(row as i32);
            self.params.push(sampling.params(end));
        }
        self.outputs[i] = first..self.select.len();
    }

    /// Writes everything to the language graph's inputs.
    fn write(&self, batch: &[Advance<'_>], language: &mut Executor, llama: &Llama) -> Result<()> {
        language.write(llama.ids, &self.ids)?;
        language.write(llama.sources, &self.sources)?;
        language.write(llama.positions, &self.positions)?;
        language.write(llama.slots, &self.slots)?;
        language.write(llama.table_starts, &self.table_starts)?;
        language.write(llama.tables, &self.tables)?;
        language.write(llama.select, &self.select)?;
        language.write(llama.params, &self.params)?;
        for (a, rows) in batch.iter().zip(&self.outputs) {
            for row in rows.clone() {
                language.write_at(llama.seen, row, &a.sequence.seen)?;
            }
        }
        for (a, rows) in batch.iter().zip(&self.rows) {
            stage_images(language, llama, a, rows.start)?;
        }
        Ok(())
    }
}

/// Copies the rows of pictures that a sequence's rows, from `row` on, stand on into the graph's input, run
/// by run.
fn stage_images(language: &mut Executor, llama: &Llama, a: &Advance<'_>, mut row: usize) -> Result<()> {
    let end = a.sequence.table.len();
    let mut position = end - a.tokens;
    while position < end {
        let mut run = 1;
        if let Some((range, image)) = a.sequence.image_at(position) {
            run = range.end.min(end) - position;
            let bytes = image.rows.bytes / image.len;
            let from = image.rows.addr + (position - range.start) * bytes;
            // SAFETY: rows `position - range.start ..+ run` of the image's own buffer, which lives in
            // the `Arc` that the sequence holds and is not written after `encode`.
            unsafe { language.copy_in(llama.image_rows, row, from, run * bytes)? };
        }
        position += run;
        row += run;
    }
    Ok(())
}
