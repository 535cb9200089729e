//! Page bookkeeping of the KV cache: integers only. What the pages hold, and where, is not known here.
//!
//! A page is owned by as many tables as its reference count says. Full pages are immutable and may be
//! shared; a partly filled last page is copied before one of several owners writes to it.

use crate::error::{Error, Result};
use crate::op::PAGE;

/// Hands out pages and counts who holds them.
#[derive(Debug)]
pub struct PageAllocator {
    /// How many tables hold each page; 0 is free.
    holders: Vec<u32>,
    /// Free pages, the next one last.
    free: Vec<u32>,
}

impl PageAllocator {
    /// `total` free pages.
    ///
    /// # Panics
    /// If there are more pages than an i32 can name; the pool's size is checked before.
    pub fn new(total: usize) -> Self {
        let total = i32::try_from(total).expect("page numbers fit an i32") as u32;
        PageAllocator { holders: vec![0; total as usize], free: (0..total).rev().collect() }
    }

    /// Pages in the pool.
    pub fn total(&self) -> usize {
        self.holders.len()
    }

    /// Pages that nobody holds.
    pub fn free(&self) -> usize {
        self.free.len()
    }

    fn take(&mut self) -> u32 {
        let page = self.free.pop().expect("the caller has checked that enough pages are free");
        debug_assert_eq!(self.holders[page as usize], 0);
        self.holders[page as usize] = 1;
        page
    }

    fn share(&mut self, page: u32) {
        let holders = &mut self.holders[page as usize];
        assert!(*holders > 0, "page {page} is free and cannot be shared");
        *holders += 1;
    }

    fn put_back(&mut self, page: u32) {
        let holders = &mut self.holders[page as usize];
        assert!(*holders > 0, "page {page} is returned twice");
        *holders -= 1;
        if *holders == 0 {
            self.free.push(page);
        }
    }

    /// Checks that the free list and the reference counts agree with each other and with `tables`,
    /// which must be all the tables there are.
    ///
    /// # Errors
    /// The first contradiction, in words.
    pub fn check_integrity<'a>(
        &self,
        tables: impl IntoIterator<Item = &'a PageTable>,
    ) -> std::result::Result<(), String> {
        let mut held = vec![0u32; self.total()];
        for table in tables {
            if table.pages.len() != table.len.div_ceil(PAGE) {
                return Err(format!("{} pages for {} positions", table.pages.len(), table.len));
            }
            for &page in &table.pages {
                held[page as usize] += 1;
            }
        }
        for (page, (&counted, &held)) in self.holders.iter().zip(&held).enumerate() {
            if counted != held {
                return Err(format!("page {page} counts {counted} holders and has {held}"));
            }
        }
        let mut seen = vec![false; self.total()];
        for &page in &self.free {
            if std::mem::replace(&mut seen[page as usize], true) {
                return Err(format!("page {page} is in the free list twice"));
            }
            if held[page as usize] != 0 {
                return Err(format!("page {page} is free and held"));
            }
        }
        let free = held.iter().filter(|&&h| h == 0).count();
        if free != self.free.len() {
            return Err(format!("{free} pages are free, {} are in the free list", self.free.len()));
        }
        Ok(())
    }
}

/// A page whose content must be copied before the table's owner may write.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct PageCopy {
    /// The shared page.
    pub from: u32,
    /// The page that took its place.
    pub to: u32,
}

/// Which pages hold a sequence's positions, in order.
#[derive(Debug, Default)]
pub struct PageTable {
    pages: Vec<u32>,
    len: usize,
}

impl PageTable {
    /// An empty table that will not reallocate up to `context` positions.
    pub fn with_context(context: usize) -> Self {
        PageTable { pages: Vec::with_capacity(context.div_ceil(PAGE)), len: 0 }
    }

    /// Positions held.
    pub fn len(&self) -> usize {
        self.len
    }

    /// Whether no position is held.
    pub fn is_empty(&self) -> bool {
        self.len == 0
    }

    /// The pages, in order of position.
    pub fn pages(&self) -> &[u32] {
        &self.pages
    }

    /// The slot of a position: page * [`PAGE`] + offset.
    ///
    /// # Panics
    /// If the position is not held.
    pub fn slot(&self, position: usize) -> usize {
        assert!(position < self.len, "position {position} of {}", self.len);
        self.pages[position / PAGE] as usize * PAGE + position % PAGE
    }

    /// Pages that [`grow`](PageTable::grow) by `positions` would take from the pool.
    pub fn pages_to_grow(&self, positions: usize, pool: &PageAllocator) -> usize {
        let fresh = (self.len + positions).div_ceil(PAGE) - self.pages.len();
        fresh + (positions > 0 && self.shared_tail(pool)) as usize
    }

    /// Makes room for `positions` more. All or nothing: on an error nothing has changed.
    /// Returns the copy that must be made before anything is written, if the last page was shared.
    ///
    /// # Errors
    /// [`Error::KvExhausted`] with the numbers.
    pub fn grow(&mut self, positions: usize, pool: &mut PageAllocator) -> Result<Option<PageCopy>> {
        let needed = self.pages_to_grow(positions, pool);
        if needed > pool.free() {
            return Err(Error::KvExhausted {
                needed,
                free: pool.free(),
                total: pool.total(),
                page_size: PAGE,
            });
        }
        let mut copy = None;
        if positions > 0 && self.shared_tail(pool) {
            let to = pool.take();
            let tail = self.pages.last_mut().expect("a shared tail exists");
            let from = std::mem::replace(tail, to);
            pool.put_back(from);
            copy = Some(PageCopy { from, to });
        }
        self.len += positions;
        while self.pages.len() < self.len.div_ceil(PAGE) {
            self.pages.push(pool.take());
        }
        Ok(copy)
    }

    /// Gives back everything beyond the first `len` positions.
    pub fn truncate(&mut self, len: usize, pool: &mut PageAllocator) {
        self.len = self.len.min(len);
        for page in self.pages.drain(self.len.div_ceil(PAGE)..).rev() {
            pool.put_back(page);
        }
    }

    /// A second table over the same pages.
    pub fn fork(&self, pool: &mut PageAllocator) -> PageTable {
        for &page in &self.pages {
            pool.share(page);
        }
        let mut pages = Vec::with_capacity(self.pages.capacity());
        pages.extend_from_slice(&self.pages);
        PageTable { pages, len: self.len }
    }

    /// Whether the last page is partly filled and somebody else holds it too.
    fn shared_tail(&self, pool: &PageAllocator) -> bool {
        !self.len.is_multiple_of(PAGE) && pool.holders[self.pages[self.len / PAGE] as usize] > 1
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use proptest::prelude::*;

    #[derive(Clone, Debug)]
    enum Step {
        Grow(usize, usize),
        Truncate(usize, usize),
        Fork(usize),
        Drop(usize),
    }

    fn step() -> impl Strategy<Value = Step> {
        prop_oneof![
            4 => (0..8usize, 0..40usize).prop_map(|(t, n)| Step::Grow(t, n)),
            1 => (0..8usize, 0..60usize).prop_map(|(t, n)| Step::Truncate(t, n)),
            2 => (0..8usize).prop_map(Step::Fork),
            1 => (0..8usize).prop_map(Step::Drop),
        ]
    }

    /// A model of the pool: what each table's positions were written with, by slot. Two tables never
    /// see each other's writes, however pages are shared; nothing leaks; nothing is used twice.
    #[test]
    fn tables_keep_what_they_wrote() {
        proptest!(|(steps in proptest::collection::vec(step(), 1..120))| {
            let mut pool = PageAllocator::new(12);
            let mut cells = vec![0u64; 12 * PAGE];
            let mut tables: Vec<(PageTable, Vec<u64>)> = vec![(PageTable::default(), vec![])];
            let mut next = 0u64;
            for step in steps {
                match step {
                    Step::Grow(t, n) => {
                        let t = t % tables.len();
                        let (table, wrote) = &mut tables[t];
                        let needed = table.pages_to_grow(n, &pool);
                        let free = pool.free();
                        match table.grow(n, &mut pool) {
                            Ok(copy) => {
                                prop_assert_eq!(pool.free() + needed, free);
                                if let Some(PageCopy { from, to }) = copy {
                                    let from = from as usize * PAGE;
                                    cells.copy_within(from..from + PAGE, to as usize * PAGE);
                                }
                                for position in wrote.len()..table.len() {
                                    next += 1;
                                    cells[table.slot(position)] = next;
                                    wrote.push(next);
                                }
                            }
                            Err(Error::KvExhausted { needed: n, free: f, .. }) => {
                                prop_assert_eq!((n, f), (needed, free));
                                prop_assert!(needed > free);
                            }
                            Err(other) => panic!("{other}"),
                        }
                    }
                    Step::Truncate(t, n) => {
                        let t = t % tables.len();
                        tables[t].0.truncate(n, &mut pool);
                        tables[t].1.truncate(n);
                    }
                    Step::Fork(t) => {
                        let t = t % tables.len();
                        let fork = (tables[t].0.fork(&mut pool), tables[t].1.clone());
                        tables.push(fork);
                    }
                    Step::Drop(t) => {
                        let t = t % tables.len();
                        tables[t].0.truncate(0, &mut pool);
                        if tables.len() > 1 { tables.swap_remove(t); } else { tables[t].1.clear(); }
                    }
                }
                prop_assert_eq!(pool.check_integrity(tables.iter().map(|t| &t.0)), Ok(()));
                for (table, wrote) in &tables {
                    let read: Vec<u64> = (0..table.len()).map(|p| cells[table.slot(p)]).collect();
                    prop_assert_eq!(&read, wrote);
                }
            }
            for (table, _) in &mut tables {
                table.truncate(0, &mut pool);
            }
            prop_assert_eq!(pool.free(), pool.total());
        });
    }

    #[test]
    fn integrity_finds_planted_faults() {
        let mut pool = PageAllocator::new(4);
        let mut table = PageTable::default();
        table.grow(20, &mut pool).unwrap();
        assert_eq!(pool.check_integrity([&table]), Ok(()));
        assert!(pool.check_integrity([]).is_err(), "a leak");
        pool.holders[table.pages[0] as usize] += 1;
        assert!(pool.check_integrity([&table]).is_err(), "a count too many");
        pool.holders[table.pages[0] as usize] -= 1;
        pool.free.push(table.pages[0]);
        assert!(pool.check_integrity([&table]).is_err(), "a page both free and held");
    }
}
