//! A token for each node, in files that the CA and the node share, for nodes without Kubernetes.

use std::{
    path::PathBuf,
    sync::{Mutex, PoisonError},
    time::{Duration, Instant},
};

use aws_lc_rs::{constant_time, digest};

use super::{Attestor, Caller, Credentials, Unattested};
use crate::config::NodeToken;
use auth_support::files;

/// 32 characters of hexadecimal are 128 bits.
const MIN_CHARACTERS: usize = 32;
const MAX_BYTES: u64 = 4096;
/// How often the files are read, at most: unknown tokens must not cause work.
const CHECK_INTERVAL: Duration = Duration::from_millis(500);

/// Identifies nodes by their tokens.
pub struct StaticTokens(Mutex<State>);

struct State {
    nodes: Vec<Node>,
    checked: Instant,
}

/// A node. Only the hash of its token is kept.
struct Node {
    name: String,
    file: PathBuf,
    hash: Option<[u8; 32]>,
}

impl StaticTokens {
    /// Reads all tokens. Fails with all errors, each with its field, if one cannot be read, is too short, or is also
    /// another node's.
    pub fn open(tokens: &[NodeToken]) -> Result<Self, Vec<String>> {
        let mut errors = Vec::new();
        let mut nodes: Vec<Node> = Vec::new();
        for (index, token) in tokens.iter().enumerate() {
            let mut node = Node {
                name: token.node.clone(),
                file: token.token_file.clone(),
                hash: None,
            };
            let mut fail = |what: String| {
                errors.push(format!("attestation.tokens[{index}].tokenFile: {what}"));
            };
            if let Err(error) = node.read() {
                fail(error);
            }
            if let Some(other) = nodes.iter().find(|other| node.shares_token_with(other)) {
                fail(format!(
                    "{} holds the token of node {}: each node needs its own",
                    token.token_file.display(),
                    other.name
                ));
            }
            nodes.push(node);
        }
        if errors.is_empty() {
            Ok(Self(Mutex::new(State {
                nodes,
                checked: Instant::now(),
            })))
        } else {
            Err(errors)
        }
    }

    /// The node that owns `token`.
    fn node(&self, token: &str) -> Option<String> {
        let hash = sha256(token.as_bytes());
        let mut state = self.0.lock().unwrap_or_else(PoisonError::into_inner);
        if state.checked.elapsed() >= CHECK_INTERVAL {
            state.check_files();
        }
        // Every token is compared, so that the time does not reveal which one matched.
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
        // A token of two nodes identifies none of them; `check_files` has logged that.
        found.filter(|_| matches == 1).cloned()
    }
}

impl State {
    fn check_files(&mut self) {
        self.checked = Instant::now();
        let mut changed = false;
        for node in &mut self.nodes {
            let before = node.hash;
            if let Err(error) = node.read()
                && before.is_some()
            {
                tracing::error!(node = %node.name, %error, "node token cannot be used: the node is refused until its file is valid");
            }
            if node.hash != before && node.hash.is_some() {
                changed = true;
                tracing::info!(node = %node.name, file = %node.file.display(), "node token read");
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
    /// Reads the file. An unusable one leaves the node without a token.
    fn read(&mut self) -> Result<(), String> {
        self.hash = None;
        let content = files::read(&self.file, MAX_BYTES).map_err(|error| error.to_string());
        let token = content
            .as_ref()
            .map_err(Clone::clone)
            .and_then(|c| check(c));
        let token = token.map_err(|what| format!("{}: {what}", self.file.display()))?;
        self.hash = Some(sha256(token));
        Ok(())
    }

    fn shares_token_with(&self, other: &Self) -> bool {
        self.hash.is_some() && self.hash == other.hash
    }
}

fn check(content: &[u8]) -> Result<&[u8], String> {
    let token = content.trim_ascii();
    if token.len() < MIN_CHARACTERS {
        return Err(format!(
            "a token of {} characters; at least {MIN_CHARACTERS} are required, such as from `openssl rand -hex 32`",
            token.len()
        ));
    }
    // RFC 6750 §2.1, and what an HTTP header can carry.
    if !token.iter().all(u8::is_ascii_graphic) {
        return Err("a token has no spaces, and only ASCII characters".into());
    }
    Ok(token)
}

fn sha256(bytes: &[u8]) -> [u8; 32] {
    let mut hash = [0; 32];
    hash.copy_from_slice(digest::digest(&digest::SHA256, bytes).as_ref());
    hash
}

#[tonic::async_trait]
impl Attestor for StaticTokens {
    async fn attest(&self, credentials: Credentials<'_>) -> Option<Result<Caller, Unattested>> {
        let node = self.node(credentials.bearer?)?;
        Some(Ok(Caller::Node { node }))
    }
}

#[cfg(test)]
mod tests {
    use std::fs;

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

    /// As if [`CHECK_INTERVAL`] had passed.
    fn node(tokens: &StaticTokens, token: &str) -> Option<String> {
        tokens.0.lock().unwrap().check_files();
        tokens.node(token)
    }

    #[test]
    fn identifies_a_node_by_its_token() {
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
    }

    #[test]
    fn refuses_bad_tokens_at_the_start() {
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
        let errors = StaticTokens::open(&list).err().unwrap();
        assert_eq!(errors.len(), 5, "{errors:?}");
        for (fail, expected) in errors.iter().zip([
            "attestation.tokens[1].tokenFile",
            "a token of 5 characters",
            "no spaces",
            "larger than 4096",
            "No such file",
        ]) {
            assert!(fail.contains(expected), "{fail}");
            assert!(!fail.contains(A), "the token itself: {fail}");
        }
    }
}
