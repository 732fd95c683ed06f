//! How much memory values take on the heap: upper bounds, for what is kept within a number of bytes.

use std::{collections::BTreeMap, sync::Arc};

use auth_mesh::{FullName, Identity, ObjectName};

/// What an allocator adds to a block at most, in bytes.
pub(super) const BLOCK: usize = 16;
/// Size of the counters that precede what an [`Arc`] points to, in bytes.
const COUNTERS: usize = 2 * size_of::<usize>();
/// Size of a node in a map from strings to strings, in bytes, and the fewest entries in one that is not the only one.
const NODE: usize = 11 * 2 * size_of::<String>() + 12 * size_of::<usize>() + 16;
const FEWEST: usize = 5;

/// A value that may have parts on the heap.
pub(super) trait HeapSize {
    /// Returns the most that these parts take, in bytes, as if nothing else shared them.
    fn heap_size(&self) -> usize;
}

impl HeapSize for String {
    fn heap_size(&self) -> usize {
        match self.capacity() {
            0 => 0,
            capacity => capacity + BLOCK,
        }
    }
}

impl HeapSize for Arc<str> {
    fn heap_size(&self) -> usize {
        self.len() + COUNTERS + BLOCK
    }
}

impl HeapSize for FullName {
    fn heap_size(&self) -> usize {
        self.pod().heap_size()
    }
}

impl<T: HeapSize> HeapSize for Option<T> {
    fn heap_size(&self) -> usize {
        self.as_ref().map_or(0, T::heap_size)
    }
}

impl HeapSize for Identity {
    fn heap_size(&self) -> usize {
        self.as_str().len() + COUNTERS + BLOCK
    }
}

impl HeapSize for Arc<ObjectName> {
    fn heap_size(&self) -> usize {
        let texts = self.namespace.heap_size() + self.name.heap_size();
        size_of::<ObjectName>() + COUNTERS + BLOCK + texts
    }
}

impl HeapSize for BTreeMap<String, String> {
    fn heap_size(&self) -> usize {
        let texts = |(key, value): (&String, &String)| key.heap_size() + value.heap_size();
        let nodes = match self.len() {
            0 => 0,
            // The nodes above the leaves are fewer than the leaves.
            len => 2 * (len / FEWEST + 1) - 1,
        };
        nodes * (NODE + BLOCK) + self.iter().map(texts).sum::<usize>()
    }
}

/// Returns the most that an entry of a hash map takes in its table, in bytes. A table is at least 7/16 full once it has
/// grown.
pub(super) const fn in_table(entry: usize) -> usize {
    (entry + 1) * 16 / 7
}
