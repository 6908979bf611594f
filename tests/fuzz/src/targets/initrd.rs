//! An initrd, packed or not, of one part or many.

use kuasar_image::{archive, report::Report};

const ENTRY: &str = "07070100000001000081ed0000000000000000000000010000000100000003000000000000000000000000000000000000000500000000";
const END: &str = "07070100000000000000000000000000000000000000010000000000000000000000000000000000000000000000000000000b00000000";

pub(crate) fn seeds() -> Vec<Vec<u8>> {
    vec![format!("{ENTRY}init\0\0abc\0{END}TRAILER!!!\0\0\0\0").into_bytes()]
}

pub(crate) fn run(input: &[u8]) {
    let mut report = Report::default();
    if archive::judge(input, &mut report).is_err() {
        return;
    }
    assert!(report.to_string().is_ascii(), "bytes of the archive reach the terminal: {report}");
}
