//! Buffers that connections borrow while bytes are on their way and give back when they idle.

use std::cell::RefCell;

use super::record::MAX_RECORD_BYTES;

/// Size of a buffer, in bytes: four full records.
pub(super) const BUFFER_BYTES: usize = 4 * MAX_RECORD_BYTES;
/// Free buffers that each thread keeps.
const MAX_FREE: usize = 32;

thread_local! {
    static FREE: RefCell<Vec<Box<[u8]>>> = const { RefCell::new(Vec::new()) };
}

/// Bytes in flight: those between `start` and `end` are filled. Holds memory only while it is not empty.
#[derive(Debug, Default)]
pub(super) struct Buffer {
    bytes: Option<Box<[u8]>>,
    start: usize,
    end: usize,
}

impl Buffer {
    pub(super) fn is_empty(&self) -> bool {
        self.start == self.end
    }

    /// The filled bytes.
    pub(super) fn filled(&self) -> &[u8] {
        self.bytes
            .as_deref()
            .map_or(&[], |bytes| &bytes[self.start..self.end])
    }

    /// The filled bytes.
    pub(super) fn filled_mut(&mut self) -> &mut [u8] {
        self.bytes
            .as_deref_mut()
            .map_or(&mut [], |bytes| &mut bytes[self.start..self.end])
    }

    /// Forgets `count` bytes at the front.
    pub(super) fn consume(&mut self, count: usize) {
        self.start += count;
        debug_assert!(self.start <= self.end);
        if self.is_empty() {
            (self.start, self.end) = (0, 0);
        }
    }

    /// The room behind the filled bytes, which move to the front first where that makes room.
    pub(super) fn spare(&mut self) -> &mut [u8] {
        let (start, end) = (self.start, self.end);
        let bytes = self.allocated();
        if start > 0 && bytes.len() - end < MAX_RECORD_BYTES {
            bytes.copy_within(start..end, 0);
            (self.start, self.end) = (0, end - start);
        }
        let end = self.end;
        &mut self.allocated()[end..]
    }

    /// Counts `count` bytes of [`Buffer::spare`] as filled.
    pub(super) fn extend(&mut self, count: usize) {
        self.end += count;
        debug_assert!(self.end <= BUFFER_BYTES);
    }

    /// The whole buffer, to be laid out by the caller and then [`Buffer::extend`]ed. Only when empty.
    pub(super) fn whole(&mut self) -> &mut [u8] {
        debug_assert!(self.is_empty());
        self.allocated()
    }

    /// Gives the memory back if nothing is held.
    pub(super) fn release(&mut self) {
        if self.is_empty()
            && let Some(bytes) = self.bytes.take()
        {
            give_back(bytes);
        }
    }

    fn allocated(&mut self) -> &mut [u8] {
        self.bytes.get_or_insert_with(|| {
            FREE.with_borrow_mut(Vec::pop)
                .unwrap_or_else(|| vec![0; BUFFER_BYTES].into_boxed_slice())
        })
    }
}

impl Drop for Buffer {
    fn drop(&mut self) {
        if let Some(bytes) = self.bytes.take() {
            give_back(bytes);
        }
    }
}

fn give_back(bytes: Box<[u8]>) {
    // A thread that is ending has no list any more: the buffer is freed.
    let _ = FREE.try_with(|free| {
        let mut free = free.borrow_mut();
        if free.len() < MAX_FREE {
            free.push(bytes);
        }
    });
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn fills_consumes_and_moves() {
        let mut buffer = Buffer::default();
        assert!(buffer.is_empty() && buffer.bytes.is_none());
        let room = buffer.spare().len();
        assert_eq!(room, BUFFER_BYTES);
        buffer.spare()[..3].copy_from_slice(b"abc");
        buffer.extend(room);
        assert_eq!(&buffer.filled()[..3], b"abc");
        assert!(buffer.spare().is_empty());
        buffer.consume(BUFFER_BYTES - 2);
        buffer.filled_mut().copy_from_slice(b"yz");
        assert_eq!(buffer.spare().len(), BUFFER_BYTES - 2, "moved to the front");
        assert_eq!(buffer.filled(), b"yz");
        buffer.release();
        assert_eq!(buffer.filled(), b"yz", "still held");
        buffer.consume(2);
        buffer.release();
        assert!(buffer.bytes.is_none());
    }
}
