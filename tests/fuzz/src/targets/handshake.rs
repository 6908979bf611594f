//! Both ends of the connection that the agent opens: what the host makes of a guest's lines, the guest of the
//! host's.

use kuasar_common::handshake::{MAX_LINE, ToHost, from_line, to_line};
use tokio::io::{AsyncWriteExt, duplex};
use vmm_task::handshake::HostLink;

use super::run_async;

pub(crate) fn seeds() -> Vec<Vec<u8>> {
    let token = format!("{{\"token\":\"{}\"}}\n", "5a".repeat(32));
    let ready = "{\"ready\":{\"agent\":\"0.1.0\",\"uptime_ns\":123456789}}\n";
    let fatal = "{\"fatal\":{\"reason\":\"mounting virtiofs at /run/kuasar/state: No such device\"}}\n";
    [token.as_str(), ready, fatal].map(|text| text.as_bytes().to_vec()).to_vec()
}

pub(crate) fn run(input: &[u8]) {
    if let Ok(message) = from_line::<ToHost>(input) {
        // What was said can be passed on, unless escapes make it longer.
        let _ = to_line(&message);
    }
    run_async(async {
        let (ours, mut theirs) = duplex(8 * MAX_LINE);
        let Ok(mut link) = HostLink::ready(ours).await else { return };
        let _ = theirs.write_all(input.get(..2 * MAX_LINE).unwrap_or(input)).await;
        let _ = theirs.shutdown().await;
        if let Ok(token) = link.token().await {
            assert!(token.len() == 64 && token.bytes().all(|byte| byte.is_ascii_hexdigit()));
        }
    });
}
