#pragma once

/// Allocations of this test binary so far, through operator new.
int allocation_count();
