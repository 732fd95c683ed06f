//! A token for each node, in files that the CA and the node share: for nodes without Kubernetes.

use std::{
    future,
    path::Path,
    sync::{Mutex, PoisonError},
    time::{Duration, Instant},
};

use aws_lc_rs::{constant_time, digest};

use super::{Attestation, Attestor, Caller, Credentials, file::WatchedFile};
use crate::config::NodeToken;

/// 32 characters of hexadecimal are 128 bits.
const MIN_CHARACTERS: usize = 32;
const MAX_BYTES: u64 = 4096;
/// How often the files are looked at, at most: strangers' tokens must not make work.
const LOOK_AGAIN: Duration = Duration::from_millis(500);

/// Knows nodes by their tokens.
pub struct StaticTokens(Mutex<State>);

struct State {
    nodes: Vec<Node>,
    looked: Instant,
}

/// Of the token only its hash is kept.
struct Node {
    name: String,
    file: WatchedFile,
    hash: Option<[u8; 32]>,
}

impl std::fmt::Debug for StaticTokens {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.debug_struct("StaticTokens").finish_non_exhaustive()
    }
}

impl StaticTokens {
    /// Reads all tokens. Fails with every fault, each with its field, where one cannot be read, is too short or is
    /// another node's, too.
    pub fn open(tokens: &[NodeToken]) -> Result<Self, Vec<String>> {
        let mut faults = Vec::new();
        let mut nodes: Vec<Node> = Vec::new();
        for (index, token) in tokens.iter().enumerate() {
            let mut node = Node {
                name: token.node.clone(),
                file: WatchedFile::new(token.token_file.clone(), MAX_BYTES),
                hash: None,
            };
            let mut fault = |what: String| {
                faults.push(format!("attestation.tokens[{index}].tokenFile: {what}"));
            };
            match node.read() {
                Ok(()) => {}
                Err(error) => fault(error),
            }
            if let Some(other) = nodes.iter().find(|other| node.shares_token_with(other)) {
                fault(format!(
                    "{} holds the token of node {}: each node needs its own",
                    token.token_file.display(),
                    other.name
                ));
            }
            nodes.push(node);
        }
        if faults.is_empty() {
            Ok(Self(Mutex::new(State {
                nodes,
                looked: Instant::now(),
            })))
        } else {
            Err(faults)
        }
    }

    /// The node whose token this is.
    fn node(&self, token: &str) -> Option<String> {
        let hash = sha256(token.as_bytes());
        let mut state = self.0.lock().unwrap_or_else(PoisonError::into_inner);
        if state.looked.elapsed() >= LOOK_AGAIN {
            state.look_again();
        }
        // All are compared, so that the time tells nothing of which one it was.
        let mut found = None;
        let mut matches = 0;
        for node in &state.nodes {
            let same = node
                .hash
                .is_some_and(|known| constant_time::verify_slices_are_equal(&known, &hash).is_ok());
            if same {
                found = Some(&node.name);
                matches += 1;
            }
        }
        // A token of two nodes says nothing; `look_again` has said so.
        found.filter(|_| matches == 1).cloned()
    }
}

impl State {
    fn look_again(&mut self) {
        self.looked = Instant::now();
        let mut changed = false;
        for node in &mut self.nodes {
            let before = node.hash;
            if let Err(error) = node.read()
                && before.is_some()
            {
                tracing::error!(node = %node.name, %error, "the node's token cannot be used: it is refused until the file is good");
            }
            if node.hash != before && node.hash.is_some() {
                changed = true;
                tracing::info!(node = %node.name, file = %node.file.path().display(), "token read");
            }
        }
        if !changed {
            return;
        }
        for (index, node) in self.nodes.iter().enumerate() {
            for other in &self.nodes[..index] {
                if node.shares_token_with(other) {
                    tracing::error!(
                        node = %node.name, other = %other.name,
                        "two nodes have the same token: both are refused until each has its own"
                    );
                }
            }
        }
    }
}

impl Node {
    /// Takes what is in the file; nothing, where it cannot be used.
    fn read(&mut self) -> Result<(), String> {
        let path = self.file.path().to_owned();
        let content = match self.file.changed() {
            Ok(None) => return Ok(()),
            Ok(Some(content)) => content,
            Err(error) => {
                self.hash = None;
                return Err(format!("{}: {error}", path.display()));
            }
        };
        self.hash = None;
        self.hash = Some(sha256(check(&content, &path)?));
        Ok(())
    }

    fn shares_token_with(&self, other: &Self) -> bool {
        self.hash.is_some() && self.hash == other.hash
    }
}

fn check<'a>(content: &'a [u8], path: &Path) -> Result<&'a [u8], String> {
    let token = content.trim_ascii();
    if token.len() < MIN_CHARACTERS {
        return Err(format!(
            "{}: a token of {} characters; it needs at least {MIN_CHARACTERS}, such as from `openssl rand -hex 32`",
            path.display(),
            token.len()
        ));
    }
    // RFC 6750 §2.1, and what an HTTP header can carry.
    if !token.iter().all(u8::is_ascii_graphic) {
        return Err(format!(
            "{}: a token has no spaces, and only characters of ASCII",
            path.display()
        ));
    }
    Ok(token)
}

fn sha256(bytes: &[u8]) -> [u8; 32] {
    let mut hash = [0; 32];
    hash.copy_from_slice(digest::digest(&digest::SHA256, bytes).as_ref());
    hash
}

impl Attestor for StaticTokens {
    fn attest<'a>(&'a self, credentials: Credentials<'a>) -> Attestation<'a> {
        let known = credentials.bearer.and_then(|token| self.node(token));
        Box::pin(future::ready(known.map(|node| Ok(Caller::Node { node }))))
    }
}

#[cfg(test)]
mod tests {
    use std::{fs, path::PathBuf};

    use super::*;

    const A: &str = "aaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaa";
    const B: &str = "bbbbbbbbbbbbbbbbbbbbbbbbbbbbbbbbbbbb";

    fn token(folder: &tempfile::TempDir, node: &str, text: &str) -> NodeToken {
        let token_file = folder.path().join(node);
        fs::write(&token_file, text).unwrap();
        NodeToken {
            node: node.into(),
            token_file,
        }
    }

    /// As if [`LOOK_AGAIN`] had passed.
    fn node(tokens: &StaticTokens, token: &str) -> Option<String> {
        tokens.0.lock().unwrap().look_again();
        tokens.node(token)
    }

    #[test]
    fn a_token_names_its_node() {
        let folder = tempfile::tempdir().unwrap();
        let list = [
            token(&folder, "a", &format!("{A}\n")),
            token(&folder, "b", B),
        ];
        let tokens = StaticTokens::open(&list).unwrap();
        assert_eq!(node(&tokens, A).as_deref(), Some("a"));
        assert_eq!(node(&tokens, B).as_deref(), Some("b"));
        assert_eq!(node(&tokens, &A[1..]), None);
        assert_eq!(node(&tokens, ""), None);

        let next = "cccccccccccccccccccccccccccccccccccc";
        fs::write(&list[0].token_file, next).unwrap();
        assert_eq!(node(&tokens, A), None);
        assert_eq!(node(&tokens, next).as_deref(), Some("a"));

        fs::write(&list[0].token_file, B).unwrap();
        assert_eq!(node(&tokens, B), None, "two nodes claim it");
        fs::remove_file(&list[0].token_file).unwrap();
        assert_eq!(node(&tokens, B).as_deref(), Some("b"));
        assert!(!format!("{tokens:?}").contains(B));
    }

    #[test]
    fn bad_tokens_are_refused_at_the_start() {
        let folder = tempfile::tempdir().unwrap();
        let list = [
            token(&folder, "a", A),
            token(&folder, "b", A),
            token(&folder, "c", "short"),
            token(&folder, "d", &format!("{A} {A}")),
            token(&folder, "e", &A.repeat(200)),
            NodeToken {
                node: "f".into(),
                token_file: PathBuf::from("/nonexistent/token"),
            },
        ];
        let faults = StaticTokens::open(&list).unwrap_err();
        assert_eq!(faults.len(), 5, "{faults:?}");
        for (fault, expected) in faults.iter().zip([
            "attestation.tokens[1].tokenFile",
            "a token of 5 characters",
            "no spaces",
            "larger than 4096",
            "No such file",
        ]) {
            assert!(fault.contains(expected), "{fault}");
            assert!(!fault.contains(A), "the token itself: {fault}");
        }
    }
}
