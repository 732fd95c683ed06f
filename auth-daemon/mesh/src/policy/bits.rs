//! Sets of small numbers.

/// Number of members in one word.
const WORD: usize = 64;

/// Returns the number of words that a set of numbers below `count` takes.
pub(super) fn words(count: usize) -> usize {
    count.div_ceil(WORD)
}

pub(super) fn insert(set: &mut [u64], member: usize) {
    set[member / WORD] |= 1 << (member % WORD);
}

fn remove(set: &mut [u64], member: usize) {
    set[member / WORD] &= !(1 << (member % WORD));
}

/// Returns the members in ascending order.
pub(super) fn members(set: &[u64]) -> impl Iterator<Item = usize> {
    set.iter().enumerate().flat_map(|(index, word)| {
        let mut left = *word;
        std::iter::from_fn(move || {
            let bit = left.checked_ilog2().map(|_| left.trailing_zeros())?;
            left &= left - 1;
            Some(index * WORD + bit as usize)
        })
    })
}

/// An immutable set that is often added to or removed from others, in whichever form takes fewer steps.
#[derive(Clone, Debug)]
pub(super) enum Frozen {
    Sparse(Box<[u32]>),
    Dense(Box<[u64]>),
}

impl Frozen {
    /// Creates a set of `members`, all of which are below `count`.
    pub(super) fn new(members: &[u32], count: usize) -> Self {
        if members.len() <= words(count) {
            return Self::Sparse(members.into());
        }
        let mut set = vec![0; words(count)];
        for member in members {
            insert(&mut set, *member as usize);
        }
        Self::Dense(set.into())
    }

    pub(super) fn add_to(&self, set: &mut [u64]) {
        match self {
            Self::Sparse(members) => members.iter().for_each(|m| insert(set, *m as usize)),
            Self::Dense(own) => set.iter_mut().zip(own).for_each(|(word, own)| *word |= own),
        }
    }

    pub(super) fn take_from(&self, set: &mut [u64]) {
        match self {
            Self::Sparse(members) => members.iter().for_each(|m| remove(set, *m as usize)),
            Self::Dense(own) => set
                .iter_mut()
                .zip(own)
                .for_each(|(word, own)| *word &= !own),
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn sparse_and_dense_are_the_same_set() {
        for taken in [
            vec![],
            vec![0],
            vec![63, 64, 199],
            (0..200).step_by(3).collect(),
        ] {
            let frozen = Frozen::new(&taken, 200);
            assert_eq!(
                matches!(frozen, Frozen::Sparse(_)),
                taken.len() <= 4,
                "{taken:?}"
            );
            let mut set = vec![0; words(200)];
            frozen.add_to(&mut set);
            let found: Vec<u32> = members(&set).map(|m| m as u32).collect();
            assert_eq!(found, taken);
            let mut all = vec![!0; words(200)];
            frozen.take_from(&mut all);
            assert!(all.iter().zip(&set).all(|(all, set)| *all == !set));
        }
    }
}
