//! DER (X.690 §10), as little of it as this CA takes apart and puts together itself.

pub(super) const INTEGER: u8 = 0x02;
pub(super) const BIT_STRING: u8 = 0x03;
pub(super) const SEQUENCE: u8 = 0x30;

/// An element of hostile bytes. Its content is not looked at yet.
#[derive(Clone, Copy, Debug)]
pub(super) struct Element<'a> {
    pub(super) tag: u8,
    pub(super) content: &'a [u8],
    /// Tag and length too.
    pub(super) whole: &'a [u8],
}

/// Takes the first element off `input`. `None` if there is none, if it is cut off, or is not DER: a length that is
/// indefinite or longer than it has to be, a tag of more than one byte.
pub(super) fn take<'a>(input: &mut &'a [u8]) -> Option<Element<'a>> {
    let (&[tag, first], rest) = input.split_first_chunk()?;
    if tag & 0x1f == 0x1f {
        return None;
    }
    let (length, header) = match first {
        0..=0x7f => (usize::from(first), 2),
        0x81..=0x84 => {
            let bytes = rest.get(..usize::from(first & 0x7f))?;
            let length = bytes.iter().fold(0, |sum, &b| sum << 8 | usize::from(b));
            if bytes[0] == 0 || length < 0x80 {
                return None;
            }
            (length, 2 + bytes.len())
        }
        _ => return None,
    };
    let (whole, rest) = input.split_at_checked(header.checked_add(length)?)?;
    *input = rest;
    Some(Element {
        tag,
        content: &whole[header..],
        whole,
    })
}

/// The same, of one tag.
pub(super) fn take_tag<'a>(tag: u8, input: &mut &'a [u8]) -> Option<Element<'a>> {
    take(input).filter(|element| element.tag == tag)
}

/// The one element that `input` is, of one tag.
pub(super) fn only<'a>(tag: u8, mut input: &'a [u8]) -> Option<Element<'a>> {
    let element = take_tag(tag, &mut input)?;
    input.is_empty().then_some(element)
}

/// An element with `parts` in a row as its content.
pub(super) fn element(tag: u8, parts: &[&[u8]]) -> Vec<u8> {
    let length: usize = parts.iter().map(|part| part.len()).sum();
    let mut out = Vec::with_capacity(length + 6);
    out.push(tag);
    if length < 0x80 {
        out.push(length as u8);
    } else {
        let bytes = length.to_be_bytes();
        let bytes = &bytes[bytes.iter().take_while(|&&b| b == 0).count()..];
        out.push(0x80 | bytes.len() as u8);
        out.extend_from_slice(bytes);
    }
    for part in parts {
        out.extend_from_slice(part);
    }
    out
}

#[cfg(test)]
mod tests {
    use proptest::prelude::*;

    use super::*;

    #[test]
    fn refuses_what_is_not_der() {
        for bytes in [
            &[][..],
            &[0x30],
            &[0x30, 1],
            &[0x30, 0x80, 0, 0],
            &[0x30, 0x81, 0x7f],
            &[0x30, 0x82, 0, 0x80],
            &[0x30, 0x85, 1, 1, 1, 1, 1],
            &[0x30, 0x84, 0xff, 0xff, 0xff, 0xff],
            &[0x1f, 0x81, 1, 0],
        ] {
            assert!(take(&mut &bytes[..]).is_none(), "{bytes:?}");
        }
        assert!(only(SEQUENCE, &[0x30, 0, 0]).is_none());
        assert!(only(INTEGER, &[0x30, 0]).is_none());
    }

    proptest! {
        #[test]
        fn reads_what_it_writes(content in prop::collection::vec(any::<u8>(), 0..70_000)) {
            let written = element(SEQUENCE, &[&content[..content.len() / 2], &content[content.len() / 2..]]);
            let read = only(SEQUENCE, &written).unwrap();
            prop_assert_eq!(read.content, &content[..]);
            prop_assert_eq!(read.whole, &written[..]);
        }

        #[test]
        fn never_panics(bytes in prop::collection::vec(any::<u8>(), 0..64)) {
            let mut rest = &bytes[..];
            while take(&mut rest).is_some() {}
        }
    }
}
