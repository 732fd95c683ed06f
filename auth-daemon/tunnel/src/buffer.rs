//! Buffers that connections hold while bytes are in flight and release when they are idle. A small buffer holds a
//! request or a handshake flight. A large buffer serves a stream.

use std::cell::RefCell;

use super::record::MAX_RECORD_BYTES;

/// Size of a small buffer, in bytes.
pub(super) const SMALL_BYTES: usize = 4096;
/// Number of full records in a large buffer. A higher number saves wake-ups, but costs memory for each stream whose
/// reader stalls.
pub(super) const RECORDS: usize = 8;
/// Size of a large buffer, in bytes.
pub(super) const LARGE_BYTES: usize = RECORDS * MAX_RECORD_BYTES;
/// Maximum number of free buffers of each size that a thread keeps.
const MAX_FREE_SMALL: usize = 64;
const MAX_FREE_LARGE: usize = 8;

#[derive(Default)]
struct Free {
    small: Vec<Box<[u8]>>,
    large: Vec<Box<[u8]>>,
}

thread_local! {
    static FREE: RefCell<Free> = RefCell::default();
}

/// Bytes in flight: those between `start` and `end` are filled. Can hold no memory while it is empty.
#[derive(Debug, Default)]
pub(super) struct Buffer {
    bytes: Option<Box<[u8]>>,
    start: usize,
    end: usize,
    /// Whether it appears to carry a stream. Selects the size of the next allocation.
    streams: bool,
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

    /// Removes `count` bytes from the front.
    pub(super) fn consume(&mut self, count: usize) {
        self.start += count;
        debug_assert!(self.start <= self.end);
        if self.is_empty() {
            (self.start, self.end) = (0, 0);
        }
    }

    /// Records whether the last read was large enough to fill a small buffer. This selects the size of the next buffer.
    pub(super) fn note_stream(&mut self, streams: bool) {
        self.streams = streams;
    }

    /// The free space after the filled bytes. Makes room first, if needed, by moving the filled bytes to the front or
    /// to a large buffer. Empty if a large buffer is full.
    pub(super) fn spare(&mut self) -> &mut [u8] {
        self.spare_for(1)
    }

    /// Like [`Buffer::spare`], but with space for `wanted` bytes if a large buffer has it.
    pub(super) fn spare_for(&mut self, wanted: usize) -> &mut [u8] {
        let length = self.allocated().len();
        if length < LARGE_BYTES && (self.streams || length - (self.end - self.start) < wanted) {
            self.grow();
        } else if self.start > 0 && length - self.end < MAX_RECORD_BYTES.max(wanted) {
            let (start, end) = (self.start, self.end);
            self.allocated().copy_within(start..end, 0);
            (self.start, self.end) = (0, end - start);
        }
        let end = self.end;
        &mut self.allocated()[end..]
    }

    /// Marks `count` bytes of [`Buffer::spare`] as filled.
    pub(super) fn extend(&mut self, count: usize) {
        self.end += count;
        debug_assert!(self.end <= LARGE_BYTES);
    }

    /// Releases the memory if the buffer is empty.
    pub(super) fn release(&mut self) {
        if self.is_empty()
            && let Some(bytes) = self.bytes.take()
        {
            give_back(bytes);
        }
    }

    fn grow(&mut self) {
        let mut large = take(true);
        let held = self.filled().len();
        large[..held].copy_from_slice(self.filled());
        (self.start, self.end) = (0, held);
        if let Some(small) = self.bytes.replace(large) {
            give_back(small);
        }
    }

    fn allocated(&mut self) -> &mut [u8] {
        self.bytes.get_or_insert_with(|| take(self.streams))
    }
}

impl Drop for Buffer {
    fn drop(&mut self) {
        if let Some(bytes) = self.bytes.take() {
            give_back(bytes);
        }
    }
}

fn take(large: bool) -> Box<[u8]> {
    let (free, size) = FREE.with_borrow_mut(|free| {
        if large {
            (free.large.pop(), LARGE_BYTES)
        } else {
            (free.small.pop(), SMALL_BYTES)
        }
    });
    free.unwrap_or_else(|| vec![0; size].into_boxed_slice())
}

fn give_back(bytes: Box<[u8]>) {
    // The thread-local lists are gone if the thread is exiting. The buffer is then freed.
    let _ = FREE.try_with(|free| {
        let mut free = free.borrow_mut();
        let (list, most) = if bytes.len() < LARGE_BYTES {
            (&mut free.small, MAX_FREE_SMALL)
        } else {
            (&mut free.large, MAX_FREE_LARGE)
        };
        if list.len() < most {
            list.push(bytes);
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
        buffer.note_stream(true);
        let room = buffer.spare().len();
        assert_eq!(room, LARGE_BYTES);
        buffer.spare()[..3].copy_from_slice(b"abc");
        buffer.extend(room);
        assert_eq!(&buffer.filled()[..3], b"abc");
        assert!(buffer.spare().is_empty());
        buffer.consume(LARGE_BYTES - 2);
        buffer.filled_mut().copy_from_slice(b"yz");
        assert_eq!(buffer.spare().len(), LARGE_BYTES - 2, "moved to the front");
        assert_eq!(buffer.filled(), b"yz");
        buffer.release();
        assert_eq!(buffer.filled(), b"yz", "still held");
        buffer.consume(2);
        buffer.release();
        assert!(buffer.bytes.is_none());
    }

    #[test]
    fn grows_with_what_it_holds() {
        let mut buffer = Buffer::default();
        assert_eq!(buffer.spare().len(), SMALL_BYTES);
        buffer.spare().fill(7);
        buffer.extend(SMALL_BYTES);
        buffer.consume(1);
        assert_eq!(
            buffer.spare().len(),
            1,
            "a byte at the front is room enough"
        );
        assert_eq!(buffer.spare_for(2).len(), LARGE_BYTES - SMALL_BYTES + 1);
        assert_eq!(buffer.filled(), &[7; SMALL_BYTES - 1]);
        buffer.consume(SMALL_BYTES - 1);
        buffer.release();
        assert_eq!(buffer.spare().len(), SMALL_BYTES, "small again");
        buffer.note_stream(true);
        assert_eq!(buffer.spare().len(), LARGE_BYTES);
        buffer.release();
        assert_eq!(buffer.spare().len(), LARGE_BYTES);
        buffer.release();
        buffer.note_stream(false);
        assert_eq!(buffer.spare().len(), SMALL_BYTES);
    }
}
